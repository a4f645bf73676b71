"""Post-training quantization: equalize, annotate with encodings, correct biases, lower to integers."""
