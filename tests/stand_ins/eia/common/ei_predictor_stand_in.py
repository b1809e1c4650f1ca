"""``EIPredictor`` over TensorFlow's own sessions on the CPU, with the arguments that the vendor documented."""

from pathlib import Path

import eia_client_stand_in as client
import numpy as np
import tensorflow as tf

v1 = tf.compat.v1


def make(with_ordinal: bool):
    """Return the class: with ``accelerator_id`` as late builds have it, or without."""

    class Base:
        def _set_up(
            self,
            model_dir,
            signature_def_key,
            signature_def,
            input_names,
            output_names,
            tags,
            graph,
            config,
            use_ei,
            accelerator_id,
        ):
            if (input_names is None) != (output_names is None):
                raise ValueError("input_names and output_names must both be specified or both be unspecified.")
            self._use_ei, self._ordinal = use_ei, accelerator_id
            tags = ["serve"] if tags is None else tags.split(",") if isinstance(tags, str) else list(tags)
            self._graph = graph or v1.Graph()
            self._session = v1.Session(graph=self._graph, config=config)
            with self._graph.as_default():
                if Path(model_dir).is_dir():
                    meta = v1.saved_model.load(self._session, tags, model_dir)
                    if input_names is None:
                        if signature_def is None:
                            if signature_def_key is None:
                                print("Using DEFAULT_SERVING_SIGNATURE_DEF_KEY .....")
                            signature_def = meta.signature_def[signature_def_key or "serving_default"]
                        input_names = {k: v.name for k, v in signature_def.inputs.items()}
                        output_names = {k: v.name for k, v in signature_def.outputs.items()}
                else:
                    if input_names is None:
                        raise ValueError("input_names must be provided for running inference on frozen graph")
                    definition = v1.GraphDef()
                    definition.ParseFromString(Path(model_dir).read_bytes())
                    v1.import_graph_def(definition, name="")
            get = self._graph.get_tensor_by_name
            self.feed_tensors = {k: get(v if ":" in v else v + ":0") for k, v in input_names.items()}
            self.fetch_tensors = {k: get(v if ":" in v else v + ":0") for k, v in output_names.items()}

        def __call__(self, model_feed_dict):
            for name in model_feed_dict:
                if name not in self.feed_tensors:
                    raise ValueError(
                        f"Incorrect input name: {name}. Does not match the input names specified in Predictor or "
                        f"signature def:  {self.feed_tensors.keys()}"
                    )
            if self._use_ei:
                client.use(self._ordinal)
            feeds = {self.feed_tensors[name]: value for name, value in model_feed_dict.items()}
            found = self._session.run(self.fetch_tensors, feeds)
            return {name: np.asarray(value) for name, value in found.items()}

    if with_ordinal:

        class EIPredictor(Base):
            def __init__(
                self,
                model_dir,
                signature_def_key=None,
                signature_def=None,
                input_names=None,
                output_names=None,
                tags=None,
                graph=None,
                config=None,
                use_ei=True,
                accelerator_id=0,
            ):
                self._set_up(
                    model_dir,
                    signature_def_key,
                    signature_def,
                    input_names,
                    output_names,
                    tags,
                    graph,
                    config,
                    use_ei,
                    accelerator_id,
                )

    else:

        class EIPredictor(Base):
            def __init__(
                self,
                model_dir,
                signature_def_key=None,
                signature_def=None,
                input_names=None,
                output_names=None,
                tags=None,
                graph=None,
                config=None,
                use_ei=True,
            ):
                self._set_up(
                    model_dir,
                    signature_def_key,
                    signature_def,
                    input_names,
                    output_names,
                    tags,
                    graph,
                    config,
                    use_ei,
                    0,
                )

    return EIPredictor
