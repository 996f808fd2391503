//! The parsers of what stands in images, one call each: for the fuzz targets.

use std::path::Path;

use crate::{ContainerError, users};

/// Number of the user and of the groups that `USER[:GROUP]` is in an image's root.
pub fn user(root: &Path, wanted: &str) -> Result<(u32, Vec<u32>), ContainerError> {
    let user = users::resolve(root, wanted)?;
    Ok((user.uid, user.groups))
}
