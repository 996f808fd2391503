//! Credentials of registries for whatever the agent reads, days after a pull too: what the CRI handed over, kubelet's
//! credential provider plugins, secrets of type `kubernetes.io/dockerconfigjson`. Docker's own configuration comes after these.

mod learned;
mod matching;
mod provider;
mod proxy;
mod secrets;

use std::sync::Arc;

use anyhow::Result;
use sluice_registry::{CredentialSource, Credentials};

use crate::config::Config;
pub(crate) use learned::Learned;
pub(crate) use proxy::serve as serve_cri;

/// All of them, in the order in which they are tried.
#[derive(Debug)]
struct Sources {
    learned: Option<Arc<Learned>>,
    secrets: Option<secrets::Secrets>,
    providers: Option<provider::Providers>,
}

/// The sources that are configured; `learned` is the daemon's own.
pub(crate) fn source(
    config: &Config,
    learned: Option<Arc<Learned>>,
) -> Result<Option<Arc<dyn CredentialSource>>> {
    let secrets = config.pull_secrets.clone().map(secrets::Secrets::new);
    let providers = match &config.credential_providers {
        Some((file, programs)) => Some(provider::Providers::read(file, programs)?),
        None => None,
    };
    if learned.is_none() && secrets.is_none() && providers.is_none() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Sources { learned, secrets, providers })))
}

impl CredentialSource for Sources {
    fn credentials(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let mut all = Vec::new();
        if let Some(learned) = &self.learned {
            all.extend(learned.get(host, repository));
        }
        if let Some(secrets) = &self.secrets {
            all.extend(secrets.get(host, repository));
        }
        if let Some(providers) = &self.providers {
            all.extend(providers.get(host, repository));
        }
        all
    }
}
