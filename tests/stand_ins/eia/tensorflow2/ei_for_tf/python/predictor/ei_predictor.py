"""``ei_for_tf``: the package of its own, with ``accelerator_id`` unless STAND_IN_OLD_PREDICTOR is 1."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4] / "common"))
from ei_predictor_stand_in import make

EIPredictor = make(with_ordinal=os.environ.get("STAND_IN_OLD_PREDICTOR") != "1")
