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

/// A pod that has the image which was made known by a first record, one that had it, and one that has another.
fn pods(recorded: &Recorded) -> Value {
    let image = recorded.lock().unwrap()[0].1.clone();
    let pod = |name: &str, image: &Value, phase: &str| {
        json!({
            "metadata": { "name": name, "namespace": "shop", "uid": format!("uid-of-{name}") },
            "spec": { "containers": [{ "name": "main", "image": image }] },
            "status": { "phase": phase },
        })
    };
    let items = [
        pod("web", &image, "Pending"),
        pod("old", &image, "Succeeded"),
        pod("other", &json!("debian"), "Running"),
    ];
    json!({ "apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items })
}

async fn answer(
    State(recorded): State<Recorded>,
    method: Method,
    uri: Uri,
    body: String,
) -> (StatusCode, axum::Json<Value>) {
    if method == Method::GET && uri.path() == "/api/v1/pods" {
        assert!(uri.query().is_some_and(|query| query.contains("spec.nodeName%3Dnode-a")), "{uri}");
        return (StatusCode::OK, axum::Json(pods(&recorded)));
    }
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
    let recorded = Recorded::new(Mutex::new(vec![("image".to_owned(), json!(rig.reference("app")))]));
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
    let told = |namespace: &str| -> Vec<Value> {
        let requests = recorded.lock().unwrap();
        let wanted = format!("POST /api/v1/namespaces/{namespace}/events");
        requests.iter().filter(|(what, _)| *what == wanted).map(|(_, body)| body.clone()).collect()
    };
    rig.wait("the events are told", || told("shop").iter().any(|event| event["reason"] == "ImageStreaming"));
    for event in told("shop") {
        let about = &event["involvedObject"];
        assert_eq!((&about["kind"], &about["name"]), (&json!("Pod"), &json!("web")), "{event}");
        assert_eq!(
            (&about["uid"], &about["fieldPath"]),
            (&json!("uid-of-web"), &json!("spec.containers{main}"))
        );
    }
    assert_eq!(told("shop").len(), 3);
    let events = told("default");
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
