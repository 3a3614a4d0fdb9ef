"""A model server: photos over HTTP, tensors over the Open Inference Protocol (REST and gRPC), a web page. No torch."""
