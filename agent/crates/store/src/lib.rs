//! Layer store: one sparse file per layer, verified blocks, state that survives a crash.
