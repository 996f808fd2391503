//! A job as a Kubernetes Job (batch/v1) with indexed completion.
//!
//! The objects are written as JSON by hand: of Kubernetes' types only a dozen fields are used, and its crates would cost more
//! to build than all of this one.

use serde_json::{Map, Value, json};

use crate::job::{Action, Job, Runnable};
use crate::plan::{Bind, Plan, RunKind, docker_options};

/// Runs scripts that are text.
const SCRIPT_IMAGE: &str = "docker.io/library/busybox:stable";

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
pub fn to_kubernetes(job: &Job, id: &str) -> Result<Value, KubernetesError> {
    let plan = Plan::of(job, usize::MAX).ok_or_else(|| refuse("taskSpec", "required"))?;
    let group = job.task_groups.first().ok_or_else(|| refuse("taskSpec", "required"))?;
    if !group.task_environments.is_empty() {
        return Err(refuse("taskEnvironments", "Kubernetes has no environment per index"));
    }
    let runnables = group.task_spec.as_ref().map(|spec| spec.runnables.as_slice()).unwrap_or_default();
    let mut volumes = Volumes::default();
    let mut containers = Vec::new();
    for (number, runnable) in runnables.iter().enumerate() {
        containers.push(container(&plan, runnable, number, id, &mut volumes)?);
    }
    // Steps run one after the other: all but the last of the foreground are init containers.
    let last = runnables.iter().rposition(|runnable| !runnable.background);
    let last = last
        .ok_or_else(|| refuse("taskSpec.runnables", "a runnable that is not in the background is needed"))?;
    if last + 1 < containers.len() {
        return Err(refuse(
            format!("taskSpec.runnables[{}]", last + 1),
            "on Kubernetes the last runnable is not in the background",
        ));
    }
    let main = containers.split_off(last);
    let mut pod = Map::new();
    pod.insert("restartPolicy".to_owned(), json!("Never"));
    pod.insert("initContainers".to_owned(), json!(containers));
    pod.insert("containers".to_owned(), json!(main));
    pod.insert("volumes".to_owned(), json!(volumes.volumes));
    if let Some(limit) = plan.max_run {
        // Per attempt, as maxRunDuration is; whole seconds, at least one.
        pod.insert("activeDeadlineSeconds".to_owned(), json!(limit.as_millis().div_ceil(1000).max(1)));
    }
    let streams =
        |runnable: &Runnable| runnable.container.as_ref().is_some_and(|one| one.enable_image_streaming);
    if runnables.iter().any(streams) {
        pod.insert("nodeSelector".to_owned(), json!({ "sluice.dev/image-streaming": "true" }));
    }
    let mut spec = json!({
        "completionMode": "Indexed", "completions": plan.task_count, "parallelism": plan.parallelism,
        "backoffLimitPerIndex": plan.max_retries,
        "template": { "metadata": { "labels": job.labels }, "spec": pod },
    });
    if let (Some(policy), Some(spec)) = (failure_policy(&plan), spec.as_object_mut()) {
        spec.insert("podFailurePolicy".to_owned(), policy);
    }
    let mut labels = job.labels.clone();
    labels.insert("app.kubernetes.io/managed-by".to_owned(), "sluice".to_owned());
    Ok(json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": id, "labels": labels }, "spec": spec,
    }))
}

/// Exit codes after which an index is not tried again.
fn failure_policy(plan: &Plan) -> Option<Value> {
    let (action, codes) = plan.policy.as_ref()?;
    let operator = match action {
        Action::FailTask => "In",
        Action::RetryTask => "NotIn",
        Action::ActionUnspecified => return None,
    };
    Some(
        json!({ "rules": [{ "action": "FailIndex", "onExitCodes": { "operator": operator, "values": codes } }] }),
    )
}

#[derive(Default)]
struct Volumes {
    volumes: Vec<Value>,
}

impl Volumes {
    /// The name of the volume of a source; one volume for each.
    fn name(&mut self, source: &str, plan: &Plan) -> String {
        let device = plan.devices.iter().any(|(_, path)| path == source);
        // A disk of the job becomes the pod's own scratch space.
        let kind = if device { json!({}) } else { json!({ "path": source }) };
        let key = if device { "emptyDir" } else { "hostPath" };
        let known = self.volumes.iter().position(|one| {
            one.get("path-of").and_then(Value::as_str) == Some(source)
                || one.get("hostPath").and_then(|host| host.get("path")).and_then(Value::as_str)
                    == Some(source)
        });
        let number = known.unwrap_or(self.volumes.len());
        let name = match plan.devices.iter().position(|(_, path)| path == source) {
            Some(device) => format!("disk-{device}"),
            None => format!("host-{number}"),
        };
        if !self.volumes.iter().any(|one| one.get("name").and_then(Value::as_str) == Some(&name)) {
            self.volumes.push(json!({ "name": name, key: kind }));
        }
        name
    }
}

fn container(
    plan: &Plan,
    runnable: &Runnable,
    number: usize,
    id: &str,
    volumes: &mut Volumes,
) -> Result<Value, KubernetesError> {
    let path = |field: &str| format!("taskSpec.runnables[{number}].{field}");
    if runnable.always_run {
        return Err(refuse(path("alwaysRun"), "Kubernetes runs nothing after a failed container"));
    }
    if runnable.ignore_exit_status && !runnable.background {
        return Err(refuse(path("ignoreExitStatus"), "Kubernetes ignores no exit status"));
    }
    if runnable.timeout.is_some() {
        return Err(refuse(
            path("timeout"),
            "Kubernetes has no time limit of one container; use maxRunDuration",
        ));
    }
    let step = plan.steps.get(number).ok_or_else(|| refuse(path(""), "not understood"))?;
    let mut one = Map::new();
    one.insert("name".to_owned(), json!(format!("runnable-{number}")));
    one.insert("env".to_owned(), environment(plan, step, id));
    let mut resources = Map::new();
    resources.extend(plan.cpu_milli.map(|cpu| ("cpu".to_owned(), json!(format!("{cpu}m")))));
    resources.extend(plan.memory_mib.map(|memory| ("memory".to_owned(), json!(format!("{memory}Mi")))));
    if !resources.is_empty() {
        one.insert("resources".to_owned(), json!({ "requests": resources, "limits": resources }));
    }
    if runnable.background {
        // A sidecar: started before the next, ended after the last.
        one.insert("restartPolicy".to_owned(), json!("Always"));
    }
    match &step.kind {
        RunKind::Barrier => return Err(refuse(path("barrier"), "Kubernetes has no barrier")),
        RunKind::File(_) => {
            return Err(refuse(
                path("script.path"),
                "nodes of the cluster do not have the file; give the text",
            ));
        }
        RunKind::Text(text) => {
            one.insert("image".to_owned(), json!(SCRIPT_IMAGE));
            one.insert("command".to_owned(), json!(["/bin/sh", "-c", text]));
        }
        RunKind::Container(container) => {
            let options = container.options.as_deref().unwrap_or("");
            if container.block_external_network
                || docker_options(options).is_ok_and(|options| options != Default::default())
            {
                return Err(refuse(
                    path("container"),
                    "options and blockExternalNetwork have no form on Kubernetes",
                ));
            }
            one.insert("image".to_owned(), json!(container.image_uri));
            if !container.commands.is_empty() {
                one.insert("args".to_owned(), json!(container.commands));
            }
            if let Some(entrypoint) =
                container.entrypoint.as_deref().filter(|entrypoint| !entrypoint.is_empty())
            {
                one.insert("command".to_owned(), json!([entrypoint]));
            }
            let mut mounts = Vec::new();
            let of_devices = || plan.devices.iter().map(|(_, path)| format!("{path}:{path}")).collect();
            let given = if container.volumes.is_empty() { of_devices() } else { container.volumes.clone() };
            for bind in given.iter().filter_map(|volume| Bind::parse(volume).ok()) {
                let name = volumes.name(&bind.source, plan);
                mounts.push(json!({ "name": name, "mountPath": bind.target, "readOnly": bind.read_only }));
            }
            one.insert("volumeMounts".to_owned(), json!(mounts));
        }
    }
    Ok(Value::Object(one))
}

fn environment(plan: &Plan, step: &crate::plan::Step, id: &str) -> Value {
    let around = crate::plan::Surroundings { job_id: id.to_owned(), ..Default::default() };
    let mut env: Vec<Value> = plan
        .variables(step, 0, 0, &around)
        .into_iter()
        .filter(|(key, _)| {
            !matches!(
                key.as_str(),
                "BATCH_TASK_INDEX" | "BATCH_TASK_RETRY_ATTEMPT" | "BATCH_VOLUMES_DIR" | "BATCH_JOB_UID"
            )
        })
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    env.push(field("BATCH_TASK_INDEX", "metadata.annotations['batch.kubernetes.io/job-completion-index']"));
    env.push(field("BATCH_JOB_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"));
    env.push(field(
        "BATCH_TASK_RETRY_ATTEMPT",
        "metadata.annotations['batch.kubernetes.io/job-index-failure-count']",
    ));
    json!(env)
}
