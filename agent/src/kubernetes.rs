//! `sluice kubernetes`: tells the API server what happens on this node — an Event on the Node, and on the pods that have the image,
//! for each thing that happens to an image, and the label that pods select nodes by, kept true to the switch.
//!
//! It runs in the DaemonSet's pod, with the pod's own account: the agent, which is privileged, has no key to the cluster.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::api::{Event, EventsRequest, NodeRequest, NodeStatus};
use crate::client::Client;
use crate::config::Config;
use crate::journal::NodeEvent;

/// Label of nodes on which new images are streamed.
const LABEL: &str = "sluice.dev/image-streaming";
/// How often the node is asked, and the agent if it is away.
const PERIOD: Duration = Duration::from_secs(5);
/// Events on Nodes are in this namespace.
const NAMESPACE: &str = "default";
/// Events that wait for a slow API server; more are lost, with a line in the log.
const WAITING: usize = 256;

/// Reports until `stop` is ready; then the label says that nothing is streamed.
pub(crate) async fn report(config: &Arc<Config>, node: &str, stop: impl Future<Output = ()>) -> Result<()> {
    let client = kube::Client::try_default().await.context("the API server is not known")?;
    let nodes: Api<Node> = Api::all(client.clone());
    let (sender, mut coming) = mpsc::channel(WAITING);
    let following = tokio::spawn(follow(Arc::clone(config), sender));
    let mut period = tokio::time::interval(PERIOD);
    let mut told = None;
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            event = coming.recv() => match event {
                Some(event) => tell(&client, node, &event).await,
                None => bail!("events are not followed any more"),
            },
            _ = period.tick() => {
                let streaming = is_streaming(config).await;
                if told != Some(streaming) {
                    match set_label(&nodes, node, streaming).await {
                        Ok(()) => told = Some(streaming),
                        Err(error) => tracing::warn!(%error, "the node's label is not set"),
                    }
                }
            }
        }
    }
    following.abort();
    set_label(&nodes, node, false).await.context("the node's label stays")
}

/// Passes on what happens from now on, whichever agent it happens to.
async fn follow(config: Arc<Config>, sender: mpsc::Sender<NodeEvent>) {
    // A new agent's log begins anew; an old one's is told again to whoever connects.
    let mut last = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    loop {
        let pass = |event: &Event| {
            if let Event::Happened { what } = event
                && what.time_ms >= last
            {
                last = what.time_ms;
                if let Err(error) = sender.try_send(what.clone()) {
                    tracing::warn!(%error, "an event is not told to the cluster");
                }
            }
        };
        let followed = match Client::connect_running(&config).await {
            Ok(Some(client)) => client.follow::<()>("events", &EventsRequest { follow: true }, pass).await,
            Ok(None) => Err(anyhow::anyhow!("no daemon runs")),
            Err(error) => Err(error),
        };
        if let Err(error) = followed {
            tracing::debug!(error = format!("{error:#}"), "the agent is away");
        }
        last += 1;
        tokio::time::sleep(PERIOD).await;
    }
}

async fn is_streaming(config: &Arc<Config>) -> bool {
    let asked = async {
        let client = Client::connect_running(config).await?.context("no daemon runs")?;
        client.ask::<NodeStatus>("node", &NodeRequest::Status).await
    };
    match tokio::time::timeout(PERIOD, asked).await {
        Ok(Ok(status)) => status.streaming,
        Ok(Err(error)) => {
            tracing::debug!(error = format!("{error:#}"), "the agent is away");
            false
        }
        Err(_elapsed) => false,
    }
}

async fn set_label(nodes: &Api<Node>, node: &str, streaming: bool) -> Result<(), kube::Error> {
    let patch = json!({ "metadata": { "labels": { LABEL: streaming.to_string() } } });
    nodes.patch_metadata(node, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

async fn tell(client: &kube::Client, node: &str, event: &NodeEvent) {
    let told = async {
        let mut about = vec![json!({ "kind": "Node", "apiVersion": "v1", "name": node, "uid": node })];
        match pods_of(client, node, &event.image).await {
            Ok(pods) => about.extend(pods),
            Err(error) => tracing::warn!(%error, "the pods that an event is about are not found"),
        }
        for involved in about {
            let object: k8s_openapi::api::core::v1::Event =
                serde_json::from_value(object(node, event, &involved)?)?;
            let namespace = object.metadata.namespace.clone().unwrap_or_default();
            Api::namespaced(client.clone(), &namespace).create(&PostParams::default(), &object).await?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = told.await {
        tracing::warn!(error = format!("{error:#}"), "an event is not told to the cluster");
    }
}

/// Containers on this node that have the image and are not over, as Events name them.
async fn pods_of(client: &kube::Client, node: &str, image: &str) -> Result<Vec<Value>, kube::Error> {
    let Ok(image) = sluice_registry::Client::parse(image) else { return Ok(Vec::new()) };
    let here = ListParams::default().fields(&format!("spec.nodeName={node}")).match_any();
    let mut found = Vec::new();
    for pod in Api::<Pod>::all(client.clone()).list(&here).await? {
        let phase = pod.status.and_then(|status| status.phase);
        if phase.is_some_and(|phase| phase == "Succeeded" || phase == "Failed") {
            continue;
        }
        let Some(spec) = pod.spec else { continue };
        let first = spec.init_containers.into_iter().flatten().map(|container| ("initContainers", container));
        let containers = first.chain(spec.containers.into_iter().map(|container| ("containers", container)));
        let has = |name: &str| sluice_registry::Client::parse(name).is_ok_and(|name| name == image);
        for (list, container) in containers {
            if container.image.as_deref().is_some_and(has) {
                found.push(json!({
                    "kind": "Pod",
                    "apiVersion": "v1",
                    "name": pod.metadata.name,
                    "namespace": pod.metadata.namespace,
                    "uid": pod.metadata.uid,
                    "fieldPath": format!("spec.{list}{{{}}}", container.name),
                }));
            }
        }
    }
    Ok(found)
}

/// The Event as the API has it. kubelet gives a Node's name as its UID, and so does `kubectl describe node` look for them.
fn object(node: &str, event: &NodeEvent, involved: &Value) -> Result<Value> {
    let time = chrono::DateTime::from_timestamp_millis(i64::try_from(event.time_ms)?).context("no time")?;
    let text = |name: &str| involved.get(name).and_then(Value::as_str).map(str::to_owned);
    let metadata = ObjectMeta {
        generate_name: text("name").map(|name| format!("{name}.")),
        // An Event is where what it is about is; one about a Node, which is nowhere, by kubelet's example here.
        namespace: Some(text("namespace").unwrap_or_else(|| NAMESPACE.to_owned())),
        ..ObjectMeta::default()
    };
    Ok(json!({
        "metadata": metadata,
        "involvedObject": involved,
        "type": event.r#type,
        "reason": format!("{:?}", event.reason),
        "message": event.message,
        "source": { "component": "sluice", "host": node },
        "firstTimestamp": time.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
        "lastTimestamp": time.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
        "count": 1,
    }))
}
