//! `allocationPolicy`: machines, disks and networks of the cloud. Read so that misspelt fields are refused, and not applied.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::number::Int64;

macro_rules! document {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub struct $name { $(pub(crate) $field: $kind),* }
    };
}

document! {
    /// Where and on what a job would run in the cloud.
    AllocationPolicy {
        location: Option<Location>,
        instances: Vec<Instance>,
        service_account: Option<ServiceAccount>,
        labels: BTreeMap<String, String>,
        network: Option<Network>,
        placement: Option<Placement>,
        tags: Vec<String>,
    }
}
document! { /// Regions and zones.
Location { allowed_locations: Vec<String> } }
document! { /// A machine, or the name of a template of one.
    Instance {
        policy: Option<InstancePolicy>,
        instance_template: Option<String>,
        install_gpu_drivers: bool,
        install_ops_agent: bool,
        block_project_ssh_keys: bool,
    }
}
document! { /// A machine.
    InstancePolicy {
        machine_type: Option<String>,
        min_cpu_platform: Option<String>,
        provisioning_model: Option<String>,
        accelerators: Vec<Accelerator>,
        boot_disk: Option<Disk>,
        disks: Vec<AttachedDisk>,
        reservation: Option<String>,
    }
}
document! { /// A graphics processor.
    Accelerator {
        r#type: Option<String>,
        count: Option<Int64>,
        install_gpu_drivers: bool,
        driver_version: Option<String>,
    }
}
document! { /// A disk.
    Disk {
        image: Option<String>,
        snapshot: Option<String>,
        r#type: Option<String>,
        size_gb: Option<Int64>,
        disk_interface: Option<String>,
    }
}
document! { /// A disk with a name, by which volumes know it.
AttachedDisk { new_disk: Option<Disk>, existing_disk: Option<String>, device_name: Option<String> } }
document! { /// Who the machine is.
ServiceAccount { email: Option<String>, scopes: Vec<String> } }
document! { /// Networks of the machine.
Network { network_interfaces: Vec<NetworkInterface> } }
document! { /// One network.
NetworkInterface { network: Option<String>, subnetwork: Option<String>, no_external_ip_address: bool } }
document! { /// How close machines are.
Placement { collocation: Option<String>, max_distance: Option<Int64> } }
