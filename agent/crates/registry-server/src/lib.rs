//! Embedded OCI registry over OCI layouts, with a shaped link and faults for trials.
