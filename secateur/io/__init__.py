"""Files: pruned models that load without secateur, ONNX files and exported programs."""
