//! Jobs on a Kubernetes cluster: made, looked at, read, ended. What a job is there is known to the crate `batch`.

use anyhow::{Context, Result, bail};
use futures::{AsyncBufRead, AsyncBufReadExt, TryStreamExt};
use k8s_openapi::api::batch::v1::Job as ClusterJob;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::json;
use sluice_batch::{Job, JobStatus, Plan, from_kubernetes, pod_index};

use super::dir::{Cluster, JobDir, Wish};
use super::processors;

/// A job's place in a cluster.
pub(crate) struct ClusterJobs {
    name: String,
    jobs: Api<ClusterJob>,
    pods: Api<Pod>,
    /// In use.
    pub(crate) namespace: String,
}

impl ClusterJobs {
    /// Reads the configuration as kubectl does; nothing is asked yet.
    pub(crate) async fn connect(name: &str, cluster: &Cluster) -> Result<Self> {
        let options = KubeConfigOptions { context: cluster.context.clone(), ..KubeConfigOptions::default() };
        let config = match &cluster.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read the cluster's configuration {}", path.display()))?;
                kube::Config::from_custom_kubeconfig(file, &options).await.map_err(anyhow::Error::from)
            }
            None if cluster.context.is_some() => {
                kube::Config::from_kubeconfig(&options).await.map_err(anyhow::Error::from)
            }
            None => kube::Config::infer().await.map_err(anyhow::Error::from),
        };
        let config = config.context("there is no cluster to speak to; see --kubeconfig and --context")?;
        let namespace = cluster.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("the cluster's configuration cannot be used")?;
        Ok(Self {
            name: name.to_owned(),
            jobs: Api::namespaced(client.clone(), &namespace),
            pods: Api::namespaced(client, &namespace),
            namespace,
        })
    }

    /// Makes the Job.
    pub(crate) async fn create(&self, job: &ClusterJob) -> Result<()> {
        let made = self.jobs.create(&PostParams::default(), job).await;
        made.map(drop).with_context(|| format!("the cluster does not take Job `{}`", self.name))
    }

    /// The job's status, in the reference's words.
    pub(crate) async fn status(&self, job: &Job, cancelled: bool) -> Result<JobStatus> {
        let plan = Plan::of(job, processors()).context("the job has no task specification")?;
        let found = self.jobs.get_opt(&self.name).await;
        let found = found.with_context(|| format!("cannot ask the cluster for Job `{}`", self.name))?;
        let Some(found) = found else {
            bail!("the cluster has no Job `{}` in namespace `{}` any more", self.name, self.namespace);
        };
        Ok(from_kubernetes(&found, &self.all_pods().await?, plan.task_count, cancelled))
    }

    async fn all_pods(&self) -> Result<Vec<Pod>> {
        let ours = ListParams::default().labels(&format!("batch.kubernetes.io/job-name={}", self.name));
        let pods = self.pods.list(&ours).await;
        Ok(pods.with_context(|| format!("cannot ask the cluster for pods of Job `{}`", self.name))?.items)
    }

    /// Ends the pods of the Job, which stays.
    pub(crate) async fn suspend(&self) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": { "suspend": true } }));
        let patched = self.jobs.patch(&self.name, &PatchParams::default(), &patch).await;
        patched.map(drop).with_context(|| format!("the cluster does not end Job `{}`", self.name))
    }

    /// Removes the Job with its pods; one that is gone is removed.
    pub(crate) async fn delete(&self) -> Result<()> {
        match self.jobs.delete(&self.name, &DeleteParams::background()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            deleted => {
                deleted.map(drop).with_context(|| format!("the cluster does not delete Job `{}`", self.name))
            }
        }
    }

    /// Gives `line` what the pods wrote: task, runnable and text, pod after pod.
    pub(crate) async fn logs(
        &self,
        task: Option<usize>,
        follow: bool,
        mut line: impl FnMut(usize, &str, &str) -> Result<()>,
    ) -> Result<()> {
        let mut pods: Vec<(usize, Pod)> = self
            .all_pods()
            .await?
            .into_iter()
            .filter_map(|pod| Some((pod_index(&pod)?, pod)))
            .filter(|(index, _)| task.is_none_or(|task| task == *index))
            .collect();
        pods.sort_by_key(|(index, pod)| (*index, pod.metadata.creation_timestamp.clone()));
        for (index, pod) in pods {
            let name = pod.metadata.name.clone().unwrap_or_default();
            for container in begun(&pod) {
                let params = LogParams { container: Some(container.clone()), follow, ..LogParams::default() };
                let from = self.pods.log_stream(&name, &params).await;
                let from = from.with_context(|| format!("cannot read the log of pod {name}, {container}"))?;
                copy(from, |text| line(index, &container, text)).await?;
            }
        }
        Ok(())
    }
}

async fn copy(from: impl AsyncBufRead, mut line: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut lines = std::pin::pin!(from.lines());
    while let Some(text) = lines.try_next().await.context("the log broke off")? {
        line(&text)?;
    }
    Ok(())
}

/// Containers of a pod that have run: the others have no log.
fn begun(pod: &Pod) -> Vec<String> {
    let status = pod.status.clone().unwrap_or_default();
    let all = status.init_container_statuses.into_iter().chain(status.container_statuses).flatten();
    let has_run = |state: &k8s_openapi::api::core::v1::ContainerState| {
        state.running.is_some() || state.terminated.is_some()
    };
    all.filter(|container| container.state.as_ref().is_some_and(has_run))
        .map(|container| container.name)
        .collect()
}

/// The status of a job, wherever it is.
pub(crate) async fn status(dir: &JobDir) -> Result<JobStatus> {
    match dir.meta()?.cluster {
        None => super::local_status(dir),
        Some(cluster) => {
            let jobs = ClusterJobs::connect(dir.id(), &cluster).await?;
            jobs.status(&dir.job()?, dir.wish() == Wish::Cancel).await
        }
    }
}
