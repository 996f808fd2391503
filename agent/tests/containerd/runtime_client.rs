//! A kubelet's side of the CRI: pods on the node's network, containers, images.

use tonic::transport::{Channel, Endpoint};

use crate::proto::runtime::image_service_client::ImageServiceClient;
use crate::proto::runtime::runtime_service_client::RuntimeServiceClient;
use crate::proto::runtime::{self as cri, NamespaceMode};
use crate::rig::Rig;

pub(crate) struct Kubelet<'a> {
    rig: &'a Rig,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl<'a> Kubelet<'a> {
    pub(crate) fn new(rig: &'a Rig) -> Self {
        Self::with_images_at(rig, "c.sock")
    }

    /// With an image service of its own.
    pub(crate) fn with_images_at(rig: &'a Rig, socket: &str) -> Self {
        let channel = |socket: &str| {
            let address = format!("unix://{}", rig.path(socket).display());
            rig.runtime.block_on(Endpoint::from_shared(address).unwrap().connect()).unwrap()
        };
        let mut runtime = RuntimeServiceClient::new(channel("c.sock"));
        // The plugin recovers its pods before it answers.
        rig.wait("the CRI plugin answers", || {
            rig.runtime.block_on(runtime.status(cri::StatusRequest { verbose: false })).is_ok()
        });
        Self { rig, runtime, images: ImageServiceClient::new(channel(socket)) }
    }

    pub(crate) fn pull(&mut self, name: &str) -> String {
        self.try_pull(name, None).unwrap()
    }

    /// A pull, with what a pull secret holds; the image's reference or the refusal.
    pub(crate) fn try_pull(&mut self, name: &str, login: Option<(&str, &str)>) -> Result<String, String> {
        let auth = login.map(|(user, password)| cri::AuthConfig {
            username: user.to_owned(),
            password: password.to_owned(),
        });
        let request = cri::PullImageRequest { image: Some(self.spec(name)), auth, sandbox_config: None };
        let pulled = self.rig.runtime.block_on(self.images.pull_image(request));
        pulled.map(|answer| answer.into_inner().image_ref).map_err(|status| status.message().to_owned())
    }

    pub(crate) fn has_image(&mut self, name: &str) -> bool {
        let request = cri::ImageStatusRequest { image: Some(self.spec(name)) };
        self.rig.runtime.block_on(self.images.image_status(request)).unwrap().into_inner().image.is_some()
    }

    pub(crate) fn remove_image(&mut self, name: &str) {
        let request = cri::RemoveImageRequest { image: Some(self.spec(name)) };
        self.rig.runtime.block_on(self.images.remove_image(request)).unwrap();
    }

    /// Bytes of the image file system, and where it is.
    pub(crate) fn image_fs(&mut self) -> (u64, String) {
        let info = self.rig.runtime.block_on(self.images.image_fs_info(cri::ImageFsInfoRequest {})).unwrap();
        let usage = info.into_inner().image_filesystems.remove(0);
        (usage.used_bytes.unwrap().value, usage.fs_id.unwrap().mountpoint)
    }

    /// A pod on the node's network, which needs no CNI plugin.
    pub(crate) fn pod(&mut self, name: &str) -> Pod {
        let host = cri::NamespaceOption {
            network: NamespaceMode::Node.into(),
            pid: NamespaceMode::Container.into(),
            ipc: NamespaceMode::Node.into(),
        };
        let logs = self.rig.path("pod-logs").join(name);
        std::fs::create_dir_all(&logs).unwrap();
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "tests".to_owned(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: String::new(),
                security_context: Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(host) }),
            }),
        };
        let request =
            cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let id = self.rig.runtime.block_on(self.runtime.run_pod_sandbox(request)).unwrap();
        Pod { id: id.into_inner().pod_sandbox_id, config, host }
    }

    /// Creates and starts a container.
    pub(crate) fn container(&mut self, pod: &Pod, image: &str, command: &[&str]) -> String {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata { name: unique(image), attempt: 0 }),
                image: Some(self.spec(image)),
                command: command.iter().map(|word| (*word).to_owned()).collect(),
                args: Vec::new(),
                log_path: "0.log".to_owned(),
                linux: Some(cri::LinuxContainerConfig {
                    security_context: Some(cri::LinuxContainerSecurityContext {
                        namespace_options: Some(pod.host),
                    }),
                }),
            }),
            sandbox_config: Some(pod.config.clone()),
        };
        let created = self.rig.runtime.block_on(self.runtime.create_container(request)).unwrap();
        let container_id = created.into_inner().container_id;
        let request = cri::StartContainerRequest { container_id: container_id.clone() };
        self.rig.runtime.block_on(self.runtime.start_container(request)).unwrap();
        container_id
    }

    /// Runs a command in a container; what it wrote.
    pub(crate) fn exec(&mut self, container: &str, script: &str) -> String {
        let request = cri::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).into(),
            timeout: 30,
        };
        let answer = self.rig.runtime.block_on(self.runtime.exec_sync(request)).unwrap().into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(answer.exit_code, 0, "{}", text(&answer.stderr));
        text(&answer.stdout)
    }

    pub(crate) fn is_running(&mut self, container: &str) -> bool {
        let request = cri::ContainerStatusRequest { container_id: container.to_owned() };
        let status = self.rig.runtime.block_on(self.runtime.container_status(request)).unwrap().into_inner();
        status.status.unwrap().state == i32::from(cri::ContainerState::ContainerRunning)
    }

    /// Stops and removes a pod with all its containers.
    pub(crate) fn remove(&mut self, pod: Pod) {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
        self.rig.runtime.block_on(self.runtime.stop_pod_sandbox(request)).unwrap();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.id };
        self.rig.runtime.block_on(self.runtime.remove_pod_sandbox(request)).unwrap();
    }

    fn spec(&self, name: &str) -> cri::ImageSpec {
        cri::ImageSpec { image: self.rig.reference(name) }
    }
}

/// A name that no other container of a pod has.
fn unique(image: &str) -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    format!("{image}-{}", since.as_nanos())
}

pub(crate) struct Pod {
    id: String,
    config: cri::PodSandboxConfig,
    host: cri::NamespaceOption,
}
