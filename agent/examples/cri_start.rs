//! One start as kubelet makes it: `cri_start SOCKET IMAGE COMMAND...` pulls the image through the CRI, starts a container and waits for
//! its end. Prints the seconds from the question for the image to the pull's answer, to the container's start and to its end.
//! The pod is there before the clock runs. `cargo xtask bench cri` drives it.
#![allow(clippy::print_stdout, reason = "a command speaks to a terminal")]

#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    missing_debug_implementations,
    unreachable_pub,
    dead_code,
    reason = "generated"
)]
#[path = "../tests/containerd/proto/runtime.rs"]
mod runtime;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use runtime::image_service_client::ImageServiceClient;
use runtime::runtime_service_client::RuntimeServiceClient;
use runtime::{self as cri, NamespaceMode};
use tonic::transport::{Channel, Endpoint};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "cri_start SOCKET IMAGE COMMAND...";
    let (socket, image) = (arguments.next().context(usage)?, arguments.next().context(usage)?);
    let channel = Endpoint::from_shared(format!("unix://{socket}"))?.connect().await?;
    let mut runtime = RuntimeServiceClient::new(channel.clone());
    let host = cri::NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Node.into(),
    };
    let config = pod_config(host);
    let sandbox = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let pod = runtime.run_pod_sandbox(sandbox).await?.into_inner().pod_sandbox_id;
    let command: Vec<String> = arguments.collect();
    let mut images = ImageServiceClient::new(channel);
    let spec = Some(cri::ImageSpec { image });
    let measured = measure(&mut runtime, &mut images, &pod, config, host, spec.clone(), command).await;
    runtime.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
    runtime.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
    // Under all its names, as only the CRI knows them: the next start finds nothing of it.
    images.remove_image(cri::RemoveImageRequest { image: spec }).await?;
    let (pulled, started, ended) = measured?;
    println!(r#"{{"pulled_s":{pulled:.3},"started_s":{started:.3},"ended_s":{ended:.3}}}"#);
    Ok(())
}

async fn measure(
    runtime: &mut RuntimeServiceClient<Channel>,
    images: &mut ImageServiceClient<Channel>,
    pod: &str,
    sandbox: cri::PodSandboxConfig,
    host: cri::NamespaceOption,
    spec: Option<cri::ImageSpec>,
    command: Vec<String>,
) -> Result<(f64, f64, f64)> {
    let clock = Instant::now();
    let pull = cri::PullImageRequest { image: spec.clone(), auth: None, sandbox_config: None };
    images.pull_image(pull).await?;
    let pulled = clock.elapsed().as_secs_f64();
    let config = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "job".to_owned(), attempt: 0 }),
        image: spec,
        command,
        args: Vec::new(),
        log_path: "0.log".to_owned(),
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(cri::LinuxContainerSecurityContext { namespace_options: Some(host) }),
        }),
    };
    let create = cri::CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(sandbox),
    };
    let container_id = runtime.create_container(create).await?.into_inner().container_id;
    runtime.start_container(cri::StartContainerRequest { container_id: container_id.clone() }).await?;
    let started = clock.elapsed().as_secs_f64();
    loop {
        let request = cri::ContainerStatusRequest { container_id: container_id.clone() };
        let status = runtime.container_status(request).await?.into_inner().status.context("no status")?;
        if status.state == i32::from(cri::ContainerState::ContainerExited) {
            let ended = clock.elapsed().as_secs_f64();
            if status.exit_code != 0 {
                bail!("the command ended with {}", status.exit_code);
            }
            return Ok((pulled, started, ended));
        }
        // As often as the difference would be seen in the figures.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn pod_config(host: cri::NamespaceOption) -> cri::PodSandboxConfig {
    let name = format!("bench-{}", std::process::id());
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            uid: name.clone(),
            name,
            namespace: "bench".to_owned(),
            attempt: 0,
        }),
        log_directory: std::env::temp_dir().display().to_string(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: String::new(),
            security_context: Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(host) }),
        }),
    }
}
