"""A server for models: the Open Inference Protocol over HTTP and gRPC. It knows sessions, never an engine."""
