"""The network: layers, encoder, decoder, predictor. It knows no request, method or file."""
