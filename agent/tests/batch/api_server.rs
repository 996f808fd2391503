//! The few paths of a Kubernetes API server that jobs need, and a job controller that does what it is told.
//!
//! A real one cannot be had from the package registries that a build may use. What is checked against this one is what the
//! binary asks and how it reads the answers, which are in the form of the API's reference (batch/v1, core/v1).

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

/// What the server has: Jobs with their status, and pods.
#[derive(Default)]
pub(crate) struct Cluster {
    pub(crate) jobs: Vec<Value>,
    pub(crate) pods: Vec<Value>,
}

/// A server that ends with the test.
pub(crate) struct ApiServer {
    pub(crate) cluster: Arc<Mutex<Cluster>>,
    pub(crate) address: String,
    _runtime: tokio::runtime::Runtime,
}

type Shared = State<Arc<Mutex<Cluster>>>;

impl ApiServer {
    pub(crate) fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cluster = Arc::new(Mutex::new(Cluster::default()));
        let routes = Router::new()
            .route("/apis/batch/v1/namespaces/{namespace}/jobs", axum::routing::post(create))
            .route("/apis/batch/v1/namespaces/{namespace}/jobs/{name}", get(read).patch(patch).delete(delete))
            .route("/api/v1/namespaces/{namespace}/pods", get(pods))
            .route("/api/v1/namespaces/{namespace}/pods/{name}/log", get(log))
            .with_state(Arc::clone(&cluster));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { cluster, address, _runtime: runtime }
    }

    /// A configuration file as kubectl's.
    pub(crate) fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\ncontexts:\n- name: test\n  context: {{cluster: test, user: test, namespace: work}}\n\
             clusters:\n- name: test\n  cluster: {{server: 'http://{}'}}\nusers:\n- name: test\n  user: {{token: secret}}\n",
            self.address
        )
    }

    /// Says what became of an index: a pod with one container, and the Job's own counts.
    pub(crate) fn pod(&self, index: usize, number: usize, phase: &str, state: &Value) {
        let name = format!("demo-{index}-{number}");
        self.cluster.lock().unwrap().pods.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "work", "creationTimestamp": format!("2026-01-01T00:00:0{number}Z"),
                "labels": { "batch.kubernetes.io/job-name": "demo" },
                "annotations": { "batch.kubernetes.io/job-completion-index": index.to_string() },
            },
            "status": { "phase": phase, "startTime": format!("2026-01-01T00:00:0{number}Z"), "containerStatuses": [{
                "name": "runnable-0", "image": "i", "imageID": "i", "ready": true, "restartCount": 0, "state": state,
            }] },
        }));
    }

    pub(crate) fn job_status(&self, status: Value) {
        self.cluster.lock().unwrap().jobs[0]["status"] = status;
    }
}

fn failed(code: StatusCode, reason: &str) -> Response {
    let status = json!({ "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code.as_u16(), "reason": reason, "message": reason });
    (code, axum::Json(status)).into_response()
}

fn place(cluster: &Cluster, name: &str) -> Option<usize> {
    cluster.jobs.iter().position(|job| job["metadata"]["name"] == name)
}

async fn create(
    State(cluster): Shared,
    Path(namespace): Path<String>,
    axum::Json(mut job): axum::Json<Value>,
) -> Response {
    let mut cluster = cluster.lock().unwrap();
    if place(&cluster, job["metadata"]["name"].as_str().unwrap()).is_some() {
        return failed(StatusCode::CONFLICT, "AlreadyExists");
    }
    job["metadata"]["namespace"] = json!(namespace);
    job["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
    cluster.jobs.push(job.clone());
    (StatusCode::CREATED, axum::Json(job)).into_response()
}

async fn read(State(cluster): Shared, Path((_, name)): Path<(String, String)>) -> Response {
    let cluster = cluster.lock().unwrap();
    match place(&cluster, &name) {
        Some(place) => axum::Json(cluster.jobs[place].clone()).into_response(),
        None => failed(StatusCode::NOT_FOUND, "NotFound"),
    }
}

/// Only what the binary sends: a merge of `spec.suspend`, upon which the controller ends the pods.
async fn patch(
    State(cluster): Shared,
    Path((_, name)): Path<(String, String)>,
    axum::Json(change): axum::Json<Value>,
) -> Response {
    let mut cluster = cluster.lock().unwrap();
    let Some(place) = place(&cluster, &name) else { return failed(StatusCode::NOT_FOUND, "NotFound") };
    assert_eq!(change, json!({ "spec": { "suspend": true } }));
    cluster.pods.clear();
    let job = &mut cluster.jobs[place];
    job["spec"]["suspend"] = json!(true);
    job["status"] = json!({ "conditions": [{ "type": "Suspended", "status": "True", "lastTransitionTime": "2026-01-01T00:01:00Z" }] });
    axum::Json(job.clone()).into_response()
}

async fn delete(
    State(cluster): Shared,
    Path((_, name)): Path<(String, String)>,
    options: axum::Json<Value>,
) -> Response {
    let mut cluster = cluster.lock().unwrap();
    let Some(place) = place(&cluster, &name) else { return failed(StatusCode::NOT_FOUND, "NotFound") };
    assert_eq!(options["propagationPolicy"], "Background");
    cluster.pods.clear();
    axum::Json(cluster.jobs.remove(place)).into_response()
}

#[derive(serde::Deserialize)]
struct Selection {
    #[serde(rename = "labelSelector")]
    labels: String,
}

async fn pods(State(cluster): Shared, Query(selection): Query<Selection>) -> Response {
    let (label, value) = selection.labels.split_once('=').unwrap();
    let cluster = cluster.lock().unwrap();
    let items: Vec<&Value> =
        cluster.pods.iter().filter(|pod| pod["metadata"]["labels"][label] == value).collect();
    axum::Json(json!({ "apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items }))
        .into_response()
}

#[derive(serde::Deserialize)]
struct Wanted {
    container: String,
}

async fn log(Path((_, name)): Path<(String, String)>, Query(wanted): Query<Wanted>) -> String {
    format!("{name} says\n{} is done\n", wanted.container)
}
