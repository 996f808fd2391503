//! Brings verified bytes from the registry into the layer store, most urgent first.
