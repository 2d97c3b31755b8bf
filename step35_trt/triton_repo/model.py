"""The model that Triton's Python backend loads: tensors between the server and a `Host`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_trt.errors import Step35Error, UsageError
from step35_trt.triton_repo.answers import CancelledError, TimedOutError
from step35_trt.triton_repo.host import Arrival
from step35_trt.triton_repo.limits import ServingLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.triton_repo.answers import Outputs
    from step35_trt.triton_repo.host import Host

BUNDLE = "bundle"  # the parameter of config.pbtxt that says where the bundle lies
# The scheduler's thread is in Python most of the time. The usual 5 ms would be how long the server's thread
# waits for its turn with each request, during which Triton's batcher loses sight of further ones.
SWITCH_SECONDS = 0.0005


class TritonPythonModel:
    """Loads the bundle that `config.pbtxt` names and answers from it until the server unloads the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load; the server shows the message where that fails."""
        self._backend = import_module("triton_python_backend_utils")
        sys.setswitchinterval(SWITCH_SECONDS)
        given = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in given.items()}
        try:
            self._host = _open(self._backend, args["model_name"], parameters)
        except Step35Error as error:
            raise self._backend.TritonModelException(f"{error.message}. {error.hint}") from None

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests; their responses follow from other threads."""
        arrivals = []
        for request in requests:
            responder = _Responder(self._backend, request)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                parameters = json.loads(request.parameters() or "{}")
                arrivals.append(Arrival(inputs, parameters, request.timeout(), responder))
            except Exception as error:  # an exception here would fail the other requests too
                responder.fail(Step35Error(f"{type(error).__name__}: {error}"))
        self._host.submit(arrivals)

    def finalize(self) -> None:
        """End everything."""
        self._host.stop()


class _Responder:
    """`Responder` over one request's sender."""

    def __init__(self, backend: Any, request: Any) -> None:
        self._backend = backend
        self._sender = request.get_response_sender()
        self._names = frozenset(request.requested_output_names())

    def send(self, outputs: Outputs, *, last: bool) -> None:
        tensors = [
            self._backend.Tensor(name, array) for name, array in outputs.items() if name in self._names
        ]
        self._sender.send(self._backend.InferenceResponse(tensors), flags=self._final if last else 0)

    def fail(self, error: Step35Error) -> None:
        kind = self._backend.TritonError
        code = (
            kind.CANCELLED
            if isinstance(error, CancelledError)
            else kind.UNAVAILABLE
            if isinstance(error, TimedOutError)
            else kind.INVALID_ARG
            if error.exit_code != Step35Error.exit_code
            else kind.INTERNAL
        )
        response = self._backend.InferenceResponse(error=kind(error.message, code))
        self._sender.send(response, flags=self._final)

    def wants(self, output: str) -> bool:
        return output in self._names

    def cancelled(self) -> bool:
        gone: bool = self._sender.is_cancelled()
        return gone

    @property
    def _final(self) -> int:
        flag: int = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        return flag


def _open(backend: Any, model: str, parameters: dict[str, str]) -> Host:
    from step35_trt.runtime.load import load_text, open_bundle
    from step35_trt.runtime.scheduling.requests import Limits
    from step35_trt.runtime.scheduling.serving import ServingLoop
    from step35_trt.triton_repo.host import Host
    from step35_trt.triton_repo.metrics import TritonMetrics

    if BUNDLE not in parameters:
        raise UsageError(f"config.pbtxt has no parameter {BUNDLE}")
    limits = ServingLimits.read(parameters)
    bundle = Path(parameters[BUNDLE])
    session = open_bundle(bundle)
    text = load_text(bundle, required=False)
    loop = ServingLoop(session, Limits(sequences=limits.sequences))
    return Host(loop, text, session.config.eos_token_id, limits, TritonMetrics(backend, model).publish)
