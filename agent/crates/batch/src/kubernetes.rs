//! A job as a Kubernetes Job (batch/v1) with indexed completion.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1 as batch;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::job::{Action, Container, Job, Runnable, TaskGroup};
use crate::plan::{Bind, Plan, RunKind, Step, Surroundings, docker_options};

/// Runs scripts that are text.
const SCRIPT_IMAGE: &str = "docker.io/library/busybox:stable";
/// Label of nodes that stream images.
pub const STREAMING_LABEL: &str = "sluice.dev/image-streaming";
/// Label by which our Jobs are known.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "sluice");
/// Annotation of a pod, which its index is read from (Kubernetes 1.21).
pub(crate) const INDEX_ANNOTATION: &str = "batch.kubernetes.io/job-completion-index";
/// Annotation of a pod: failures of its index before it (Kubernetes 1.28).
const FAILURES_ANNOTATION: &str = "batch.kubernetes.io/job-index-failure-count";
/// Variables of ours that the cluster sets, or that only mean something on one machine.
const OF_THE_CLUSTER: [&str; 6] = [
    "BATCH_TASK_INDEX",
    "BATCH_TASK_RETRY_ATTEMPT",
    "BATCH_JOB_UID",
    "BATCH_NODE_COUNT",
    "BATCH_NODE_INDEX",
    "BATCH_MAIN_NODE_HOSTNAME",
];

/// Why a job has no form on Kubernetes.
#[derive(Debug, thiserror::Error)]
#[error("taskGroups[0].{path}: {message}")]
pub struct KubernetesError {
    path: String,
    message: &'static str,
}

fn refuse(path: impl Into<String>, message: &'static str) -> KubernetesError {
    KubernetesError { path: path.into(), message }
}

/// The Job of a job that was checked, named `id`.
pub fn to_kubernetes(job: &Job, id: &str) -> Result<batch::Job, KubernetesError> {
    let plan = Plan::of(job, usize::MAX).ok_or_else(|| refuse("taskSpec", "required"))?;
    let group = job.task_groups.first().ok_or_else(|| refuse("taskSpec", "required"))?;
    let count = |number: usize, path: &str| {
        i32::try_from(number).map_err(|_too_many| refuse(path, "more than Kubernetes can count"))
    };
    let spec = batch::JobSpec {
        completion_mode: Some("Indexed".to_owned()),
        completions: Some(count(plan.task_count, "taskCount")?),
        parallelism: Some(count(plan.parallelism, "parallelism")?),
        backoff_limit_per_index: Some(i32::try_from(plan.max_retries).unwrap_or(i32::MAX)),
        pod_failure_policy: failure_policy(&plan),
        template: core::PodTemplateSpec {
            metadata: Some(ObjectMeta { labels: Some(job.labels.clone()), ..ObjectMeta::default() }),
            spec: Some(pod(&plan, group, id)?),
        },
        ..batch::JobSpec::default()
    };
    let mut labels = job.labels.clone();
    labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned());
    let metadata = ObjectMeta { name: Some(id.to_owned()), labels: Some(labels), ..ObjectMeta::default() };
    Ok(batch::Job { metadata, spec: Some(spec), status: None })
}

fn pod(plan: &Plan, group: &TaskGroup, id: &str) -> Result<core::PodSpec, KubernetesError> {
    if !group.task_environments.is_empty() {
        return Err(refuse("taskEnvironments", "Kubernetes has no environment per index"));
    }
    if plan.hosts_file {
        return Err(refuse("requireHostsFile", "the pods of a Job do not know each other"));
    }
    let runnables = group.task_spec.as_ref().map(|spec| spec.runnables.as_slice()).unwrap_or_default();
    let mut volumes = Volumes::default();
    let mut containers = Vec::new();
    for (number, (runnable, step)) in runnables.iter().zip(&plan.steps).enumerate() {
        containers.push(container(plan, runnable, step, number, id, &mut volumes)?);
    }
    // Steps run one after the other: all but the last of the foreground are init containers.
    let last = runnables
        .iter()
        .rposition(|runnable| !runnable.background)
        .ok_or_else(|| refuse("taskSpec.runnables", "a runnable that is not in the background is needed"))?;
    if last + 1 < containers.len() {
        let path = format!("taskSpec.runnables[{}]", last + 1);
        return Err(refuse(path, "on Kubernetes the last runnable is not in the background"));
    }
    let main = containers.split_off(last.min(containers.len()));
    let streams =
        |runnable: &Runnable| runnable.container.as_ref().is_some_and(|one| one.enable_image_streaming);
    let selector = || BTreeMap::from([(STREAMING_LABEL.to_owned(), "true".to_owned())]);
    Ok(core::PodSpec {
        restart_policy: Some("Never".to_owned()),
        init_containers: (!containers.is_empty()).then_some(containers),
        containers: main,
        volumes: (!volumes.volumes.is_empty()).then_some(volumes.volumes),
        // Per attempt, as maxRunDuration is; whole seconds, at least one.
        active_deadline_seconds: plan
            .max_run
            .map(|limit| i64::try_from(limit.as_millis().div_ceil(1000).max(1)).unwrap_or(i64::MAX)),
        node_selector: runnables.iter().any(streams).then(selector),
        ..core::PodSpec::default()
    })
}

/// Exit codes after which an index is not tried again.
fn failure_policy(plan: &Plan) -> Option<batch::PodFailurePolicy> {
    let (action, codes) = plan.policy.as_ref()?;
    let operator = match action {
        Action::FailTask => "In",
        Action::RetryTask => "NotIn",
        Action::ActionUnspecified => return None,
    };
    // The cluster wants them in order, once each, and never 0.
    let mut values: Vec<i32> = codes.iter().copied().filter(|code| *code != 0).collect();
    values.sort_unstable();
    values.dedup();
    let rule = batch::PodFailurePolicyRule {
        action: "FailIndex".to_owned(),
        on_exit_codes: Some(batch::PodFailurePolicyOnExitCodesRequirement {
            container_name: None,
            operator: operator.to_owned(),
            values,
        }),
        on_pod_conditions: None,
    };
    Some(batch::PodFailurePolicy { rules: vec![rule] })
}

#[derive(Default)]
struct Volumes {
    volumes: Vec<core::Volume>,
}

impl Volumes {
    /// The name of the volume of a source; one volume for each.
    fn name(&mut self, source: &str, plan: &Plan) -> String {
        let of_host =
            |volume: &&core::Volume| volume.host_path.as_ref().is_some_and(|host| host.path == source);
        if let Some(known) = self.volumes.iter().find(of_host) {
            return known.name.clone();
        }
        let mut volume = core::Volume::default();
        match plan.devices.iter().position(|(_, path)| path == source) {
            // A disk of the job becomes the pod's own scratch space.
            Some(device) => {
                volume.name = format!("disk-{device}");
                volume.empty_dir = Some(core::EmptyDirVolumeSource::default());
            }
            None => {
                volume.name = format!("host-{}", self.volumes.len());
                volume.host_path =
                    Some(core::HostPathVolumeSource { path: source.to_owned(), ..Default::default() });
            }
        }
        let name = volume.name.clone();
        if !self.volumes.iter().any(|known| known.name == name) {
            self.volumes.push(volume);
        }
        name
    }
}

fn container(
    plan: &Plan,
    runnable: &Runnable,
    step: &Step,
    number: usize,
    id: &str,
    volumes: &mut Volumes,
) -> Result<core::Container, KubernetesError> {
    let path = |field: &str| format!("taskSpec.runnables[{number}].{field}");
    if runnable.always_run {
        return Err(refuse(path("alwaysRun"), "Kubernetes runs nothing after a failed container"));
    }
    if runnable.ignore_exit_status && !runnable.background {
        return Err(refuse(path("ignoreExitStatus"), "Kubernetes ignores no exit status"));
    }
    if runnable.timeout.is_some() {
        let message = "Kubernetes has no time limit of one container; use maxRunDuration";
        return Err(refuse(path("timeout"), message));
    }
    let mut one = core::Container {
        name: format!("runnable-{number}"),
        env: Some(environment(plan, step, id)),
        resources: resources(plan),
        // A sidecar: started before the next, ended after the last.
        restart_policy: runnable.background.then(|| "Always".to_owned()),
        ..core::Container::default()
    };
    let given = match &step.kind {
        RunKind::Barrier => return Err(refuse(path("barrier"), "Kubernetes has no barrier")),
        RunKind::File(_) => {
            let message = "nodes of the cluster do not have the file; give the text";
            return Err(refuse(path("script.path"), message));
        }
        RunKind::Text(text) => {
            if text.starts_with("#!") {
                let message =
                    "on Kubernetes a script is run by a shell; use a container for another interpreter";
                return Err(refuse(path("script.text"), message));
            }
            one.image = Some(SCRIPT_IMAGE.to_owned());
            one.command = Some(["/bin/sh", "-c", text].map(str::to_owned).to_vec());
            Vec::new()
        }
        RunKind::Container(container) => {
            take_container(&mut one, container).map_err(|message| refuse(path("container"), message))?;
            container.volumes.clone()
        }
    };
    let of_devices = || plan.devices.iter().map(|(_, path)| format!("{path}:{path}")).collect();
    let given: Vec<String> = if given.is_empty() { of_devices() } else { given };
    let mount = |bind: Bind| core::VolumeMount {
        name: volumes.name(&bind.source, plan),
        mount_path: bind.target,
        read_only: bind.read_only.then_some(true),
        ..core::VolumeMount::default()
    };
    let mounts: Vec<_> = given.iter().filter_map(|volume| Bind::parse(volume).ok()).map(mount).collect();
    one.volume_mounts = (!mounts.is_empty()).then_some(mounts);
    Ok(one)
}

fn take_container(one: &mut core::Container, container: &Container) -> Result<(), &'static str> {
    let options = container.options.as_deref().unwrap_or("");
    let plain = docker_options(options).is_ok_and(|options| options == Default::default());
    if container.block_external_network || !plain {
        return Err("options and blockExternalNetwork have no form on Kubernetes");
    }
    if container.username.is_some() {
        return Err("a cluster has an image's credentials in imagePullSecrets, not in the job");
    }
    one.image = Some(container.image_uri.clone());
    one.args = (!container.commands.is_empty()).then(|| container.commands.clone());
    let entrypoint = container.entrypoint.as_ref().filter(|entrypoint| !entrypoint.is_empty());
    one.command = entrypoint.map(|entrypoint| vec![entrypoint.clone()]);
    Ok(())
}

fn resources(plan: &Plan) -> Option<core::ResourceRequirements> {
    let mut amounts = BTreeMap::new();
    amounts.extend(plan.cpu_milli.map(|cpu| ("cpu".to_owned(), Quantity(format!("{cpu}m")))));
    amounts.extend(plan.memory_mib.map(|memory| ("memory".to_owned(), Quantity(format!("{memory}Mi")))));
    (!amounts.is_empty()).then(|| core::ResourceRequirements {
        limits: Some(amounts.clone()),
        requests: Some(amounts),
        ..core::ResourceRequirements::default()
    })
}

fn environment(plan: &Plan, step: &Step, id: &str) -> Vec<core::EnvVar> {
    let around = Surroundings { job_id: id.to_owned(), ..Default::default() };
    let mut env: Vec<core::EnvVar> = plan
        .variables(step, 0, 0, &around)
        .into_iter()
        .filter(|(key, _)| !OF_THE_CLUSTER.contains(&key.as_str()))
        // `$(NAME)` would be replaced by the cluster.
        .map(|(name, value)| core::EnvVar { name, value: Some(value.replace("$(", "$$(")), value_from: None })
        .collect();
    for (name, path) in [
        ("BATCH_TASK_INDEX", format!("metadata.annotations['{INDEX_ANNOTATION}']")),
        ("BATCH_JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']".to_owned()),
        ("BATCH_TASK_RETRY_ATTEMPT", format!("metadata.annotations['{FAILURES_ANNOTATION}']")),
    ] {
        let field = core::ObjectFieldSelector { api_version: None, field_path: path };
        env.push(core::EnvVar {
            name: name.to_owned(),
            value: None,
            value_from: Some(core::EnvVarSource { field_ref: Some(field), ..Default::default() }),
        });
    }
    env
}
