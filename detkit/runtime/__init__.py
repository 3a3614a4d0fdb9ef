"""Running an exported model with numpy and ONNX Runtime; never imports torch."""
