"""The models behind a server: a repository of them, loaded, batched, isolated, counted. See `ModelService`."""

from accelrt.serve.models.service import ModelService
from accelrt.serve.models.settings import ModelSettings, ServiceSettings

__all__ = ["ModelService", "ModelSettings", "ServiceSettings"]
