"""``ei_for_tf``: the package of its own, with ``accelerator_id``."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), *[os.pardir] * 4, "common"))
from ei_predictor_stand_in import make  # noqa: E402

EIPredictor = make(with_ordinal=os.environ.get("STAND_IN_OLD_PREDICTOR") != "1")
