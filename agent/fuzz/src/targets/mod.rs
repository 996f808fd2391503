//! One module per parser of outside bytes; its name is the target's, and that of its seeds.

mod api;
mod batch;
mod challenge;
mod docker_config;
mod elf;
mod embedded;
mod erofs;
mod faults;
mod gzip;
mod hosts;
mod index;
mod manifest;
mod pack;
mod pax;
mod profile;
mod provider;
mod reference;
mod referrers;
mod replay;
mod summary;
mod tar;
mod trace;
mod users;
mod zstd;

/// What is driven with any bytes.
pub type Target = fn(&[u8]);

/// All of them by name.
pub const TARGETS: [(&str, Target); 24] = [
    ("api", api::run),
    ("batch", batch::run),
    ("challenge", challenge::run),
    ("docker_config", docker_config::run),
    ("elf", elf::run),
    ("embedded", embedded::run),
    ("erofs", erofs::run),
    ("faults", faults::run),
    ("gzip", gzip::run),
    ("hosts", hosts::run),
    ("index", index::run),
    ("manifest", manifest::run),
    ("pack", pack::run),
    ("pax", pax::run),
    ("profile", profile::run),
    ("provider", provider::run),
    ("reference", reference::run),
    ("referrers", referrers::run),
    ("replay", replay::run),
    ("summary", summary::run),
    ("tar", tar::run),
    ("trace", trace::run),
    ("users", users::run),
    ("zstd", zstd::run),
];
