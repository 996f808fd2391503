//! What the fuzz targets share: each parser driven as the product drives it, with properties that must hold.

pub mod decode;
pub mod index;
pub mod tar;
