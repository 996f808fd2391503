//! What the cluster is told: requests of `sluice kubernetes`, recorded by a server that answers as the API is documented to.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::images::varied;
use crate::rig::{Rig, ok};

type Recorded = Arc<Mutex<Vec<(String, Value)>>>;

async fn answer(
    State(recorded): State<Recorded>,
    method: Method,
    uri: Uri,
    body: String,
) -> (StatusCode, axum::Json<Value>) {
    let body: Value = serde_json::from_str(&body).unwrap();
    recorded.lock().unwrap().push((format!("{method} {}", uri.path()), body.clone()));
    let object = if method == Method::PATCH {
        json!({ "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": { "name": "node-a" } })
    } else {
        body
    };
    (if method == Method::POST { StatusCode::CREATED } else { StatusCode::OK }, axum::Json(object))
}

#[test]
fn the_cluster_has_the_nodes_label_and_its_events() {
    let rig = Rig::new("[stream]\nfill = false\n");
    rig.images.add("app", varied(70), &["sh"]);
    rig.index("app");
    let recorded = Recorded::default();
    let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&recorded));
    let listener = rig.runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let server = rig.runtime.spawn(async move { axum::serve(listener, router).await });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://{address}") } }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        "users": [{ "name": "u", "user": { "token": "t" } }],
    });
    std::fs::write(rig.path("kubeconfig"), kubeconfig.to_string()).unwrap();
    let mut reporter = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .arg("--config")
        .arg(rig.path("config.toml"))
        .arg("--state")
        .arg(rig.path("state"))
        .args(["kubernetes", "--node", "node-a"])
        .env("KUBECONFIG", rig.path("kubeconfig"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let labels = || -> Vec<String> {
        let requests = recorded.lock().unwrap();
        let patches = requests.iter().filter(|(what, _)| what == "PATCH /api/v1/nodes/node-a");
        let label = |body: &Value| {
            body["metadata"]["labels"]["sluice.dev/image-streaming"].as_str().unwrap().to_owned()
        };
        patches.map(|(_, body)| label(body)).collect()
    };
    rig.wait("the label is set", || labels() == ["true"]);
    rig.ctr_pull("app");
    let told = || -> Vec<Value> {
        let requests = recorded.lock().unwrap();
        let posts = requests.iter().filter(|(what, _)| what == "POST /api/v1/namespaces/default/events");
        posts.map(|(_, body)| body.clone()).collect()
    };
    rig.wait("the events are told", || told().iter().any(|event| event["reason"] == "ImageStreaming"));
    let events = told();
    let reasons: Vec<&str> = events.iter().map(|event| event["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["Pulling", "Pulled", "ImageStreaming"]);
    let event = &events[2];
    assert_eq!(event["involvedObject"]["kind"], "Node");
    assert_eq!(event["involvedObject"]["name"], "node-a");
    assert_eq!(
        (event["type"].as_str(), event["source"]["component"].as_str()),
        (Some("Normal"), Some("sluice"))
    );
    assert!(event["message"].as_str().unwrap().ends_with("is backed by image streaming."), "{event}");
    ok(&rig.sluice(&["node", "disable"]));
    rig.wait("the label follows", || labels() == ["true", "false"]);
    ok(&rig.sluice(&["node", "enable"]));
    rig.wait("and back", || labels() == ["true", "false", "true"]);
    kill(Pid::from_raw(reporter.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(reporter.wait().unwrap().success());
    assert_eq!(labels().last().map(String::as_str), Some("false"), "nobody keeps it true any more");
    server.abort();
}
