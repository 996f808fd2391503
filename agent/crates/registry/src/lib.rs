//! Registry client: references, authentication, manifests, referrers, ranged blob reads.
