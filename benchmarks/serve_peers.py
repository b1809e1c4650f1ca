"""The servers that accelrt is measured against, as their manuals have them written, run by their own interpreters.

All take the protocol's JSON and answer in it; each calls the same ONNX file by onnxruntime with one thread, in one
worker process. ``python serve_peers.py KIND PORT MODEL`` serves one model; nothing of accelrt is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
except ModuleNotFoundError as error:  # of a peer's environment
    sys.exit(f"{error.name} is missing here")

MODEL_VARIABLE = "SERVE_PEERS_MODEL"


class Model:
    """An ONNX file with one input ``x`` and one output ``y``."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, document: dict[str, Any]) -> dict[str, Any]:
        """Answer a request of the protocol."""
        given = document["inputs"][0]
        y = self.run(np.array(given["data"], np.float32).reshape(given["shape"]))
        output = {"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}
        return {"model_name": "model", "model_version": "1", "outputs": [output]}

    def run(self, x: Any) -> Any:
        """Compute y."""
        return self._session.run(["y"], {"x": x})[0]


def serve_fastapi(port: int, model: Model) -> None:
    """Bare FastAPI: the body by orjson, no checks by pydantic, uvicorn with uvloop and httptools, no access log."""
    import orjson
    import uvicorn
    from fastapi import FastAPI, Request, Response

    app = FastAPI()

    async def infer(request: Request) -> Response:
        return Response(orjson.dumps(model(orjson.loads(await request.body()))), media_type="application/json")

    # Not as text, which `from __future__ import annotations` makes of it: FastAPI would look for the names here.
    infer.__annotations__ = {"request": Request, "return": Response}
    app.post("/infer", response_class=Response)(infer)
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="error")


def serve_litserve(port: int) -> None:
    """LitServe with one worker."""
    import litserve
    import serve_peers  # its worker unpickles the class, so it must be of a module that can be imported

    api = serve_peers.Lit(api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def serve_bentoml(port: int) -> None:
    """BentoML with one worker; the service is a class of this module, which its worker imports."""
    os.execv(
        sys.executable,
        [sys.executable, "-m", "bentoml", "serve", "serve_peers:Bento", "--host", "127.0.0.1", "--port", str(port)],
    )


def serve_mlserver(port: int, path: str, folder: Path) -> None:
    """MLServer with a runtime of this module, without worker processes, which would be slower."""
    (folder / "model").mkdir(parents=True)
    settings = {"debug": False, "host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
    settings |= {"parallel_workers": 0, "access_logger": None, "use_structured_logging": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "model", "implementation": "serve_peers.Runtime", "parameters": {"uri": path}}
    (folder / "model" / "model-settings.json").write_text(json.dumps(model))
    sys.argv = ["mlserver", "start", str(folder)]
    from mlserver.cli import main as start

    start()


if __name__ == "serve_peers":  # imported, by a worker: one of the three is there
    try:
        from litserve import LitAPI

        class Lit(LitAPI):  # type: ignore[misc]
            """LitServe's three steps around the model."""

            def setup(self, device: str) -> None:
                self._model = Model(os.environ[MODEL_VARIABLE])

            def decode_request(self, request: Any) -> Any:
                return request

            def predict(self, x: Any) -> Any:
                return self._model(x)

            def encode_response(self, output: Any) -> Any:
                return output

        # LitServe reads them, and cannot make anything of text.
        Lit.decode_request.__annotations__, Lit.encode_response.__annotations__ = {}, {}
    except ModuleNotFoundError:
        pass
    try:
        import bentoml

        class _Bento:
            def __init__(self) -> None:
                self.model = Model(os.environ[MODEL_VARIABLE])

            @bentoml.api(route="/infer")  # type: ignore[untyped-decorator]
            def infer(self, inputs: list) -> dict:  # type: ignore[type-arg]
                return self.model({"inputs": inputs})

        _Bento.infer.func.__annotations__ = {"inputs": list, "return": dict}
        Bento = bentoml.service(workers=1, logging={"access": {"enabled": False}})(_Bento)
    except ModuleNotFoundError:
        pass
    try:
        from mlserver import MLModel
        from mlserver.codecs import NumpyCodec

        class Runtime(MLModel):  # type: ignore[misc]
            """MLServer's own types and codecs around the model."""

            async def load(self) -> bool:
                self._model = Model(self.settings.parameters.uri)
                return True

            async def predict(self, payload: Any) -> Any:
                from mlserver.types import InferenceResponse

                x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
                return InferenceResponse(
                    model_name="model", outputs=[NumpyCodec.encode_output("y", self._model.run(x))]
                )

    except ModuleNotFoundError:
        pass


def main() -> None:
    """Serve."""
    kind, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.environ[MODEL_VARIABLE] = path
    if kind == "fastapi":
        serve_fastapi(port, Model(path))
    elif kind == "litserve":
        serve_litserve(port)
    elif kind == "bentoml":
        serve_bentoml(port)
    elif kind == "mlserver":
        serve_mlserver(port, path, Path(sys.argv[4]))


if __name__ == "__main__":
    main()
