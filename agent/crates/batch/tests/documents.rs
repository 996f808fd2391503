//! Documents: what is accepted, what is refused and under which path, and what follows from an attempt's end.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

use proptest::prelude::*;
use serde_json::{Value, json};
use sluice_batch::{
    JobError, JobState, Outcome, Plan, Surroundings, Verdict, parse, to_kubernetes, valid_job_id, verdict,
};

/// The form of the reference's example of image streaming.
fn streaming() -> Value {
    json!({
        "taskGroups": [{
            "taskSpec": { "runnables": [{ "container": {
                "imageUri": "registry.example/app:1", "entrypoint": "/bin/sh",
                "commands": ["-c", "echo Hello world! This is task ${BATCH_TASK_INDEX}."], "enableImageStreaming": true,
            } }] },
            "taskCount": "4", "parallelism": 2,
        }],
        "allocationPolicy": { "instances": [{ "policy": { "machineType": "e2-standard-4" } }], "location": { "allowedLocations": ["regions/us-central1"] } },
        "logsPolicy": { "destination": "CLOUD_LOGGING" },
    })
}

fn changed(pointer: &str, key: &str, value: Value) -> Value {
    let mut document = streaming();
    let place = document.pointer_mut(pointer).unwrap();
    place.as_object_mut().unwrap().insert(key.to_owned(), value);
    document
}

fn verdict_on(document: &Value, relaxed: bool) -> Result<Vec<String>, String> {
    let job = parse(document.to_string().as_bytes()).map_err(|error| error.to_string())?;
    let checked = job.check(relaxed).map_err(|error| error.to_string())?;
    Ok(checked.notes.iter().map(|note| note.path.clone()).collect())
}

const CONTAINER: &str = "/taskGroups/0/taskSpec/runnables/0/container";
const RUNNABLE: &str = "/taskGroups/0/taskSpec/runnables/0";
const SPEC: &str = "/taskGroups/0/taskSpec";
const GROUP: &str = "/taskGroups/0";

#[test]
fn the_references_example_is_accepted_and_what_is_not_applied_is_said() {
    assert_eq!(verdict_on(&streaming(), false).unwrap(), ["allocationPolicy"]);
}

#[test]
fn each_rule_names_the_path() {
    let table = [
        (changed("", "taskGroup", json!([])), "taskGroup", "unknown field"),
        (changed("", "taskGroups", json!([])), "taskGroups", "exactly one"),
        (
            changed(CONTAINER, "imageUrl", json!("x")),
            "taskGroups[0].taskSpec.runnables[0].container.imageUrl",
            "unknown field",
        ),
        (
            changed("/allocationPolicy/instances/0/policy", "machine", json!("x")),
            "allocationPolicy.instances[0].policy.machine",
            "unknown field",
        ),
        (
            changed(CONTAINER, "options", json!("--network host")),
            "taskGroups[0].taskSpec.runnables[0].container.options",
            "only supports imageUri, commands, entrypoint and volumes",
        ),
        (
            changed(CONTAINER, "username", json!("me")),
            "taskGroups[0].taskSpec.runnables[0].container.username",
            "only supports",
        ),
        (changed(CONTAINER, "volumes", json!(["data:/x"])), "container.volumes[0]", "absolute"),
        (changed(CONTAINER, "imageUri", json!("")), "container.imageUri", "needed"),
        (
            changed(RUNNABLE, "script", json!({"text": "x"})),
            "runnables[0]: ",
            "exactly one of container, script and barrier",
        ),
        (changed(RUNNABLE, "timeout", json!("5")), "runnables[0].timeout", "not a duration"),
        (
            changed(SPEC, "volumes", json!([{"gcs": {"remotePath": "b"}, "mountPath": "/m"}])),
            "taskSpec.volumes[0].gcs",
            "not mounted",
        ),
        (
            changed(
                SPEC,
                "volumes",
                json!([{"nfs": {"server": "s", "remotePath": "/b"}, "mountPath": "/m"}]),
            ),
            "taskSpec.volumes[0].nfs",
            "not mounted",
        ),
        (
            changed(SPEC, "volumes", json!([{"deviceName": "../x", "mountPath": "/m"}])),
            "taskSpec.volumes[0].deviceName",
            "not a name",
        ),
        (changed(SPEC, "maxRetryCount", json!(11)), "taskSpec.maxRetryCount", "0 to 10"),
        (
            changed(SPEC, "lifecyclePolicies", json!([{"action": "RETRY_TASK"}])),
            "lifecyclePolicies[0].actionCondition.exitCodes",
            "at least one",
        ),
        (
            changed(SPEC, "environment", json!({"secretVariables": {"A": "b"}})),
            "taskSpec.environment.secretVariables",
            "Secret Manager",
        ),
        (
            changed(SPEC, "environment", json!({"variables": {"A=B": "b"}})),
            "taskSpec.environment.variables",
            "not a name",
        ),
        (changed(SPEC, "runnables", json!([{"barrier": {}}])), "runnables[0].barrier", "never passed"),
        (changed(SPEC, "runnables", json!([{"script": {}}])), "runnables[0].script", "path and text"),
        (changed(GROUP, "taskCount", json!("many")), "taskGroups[0].taskCount", "whole number"),
        (changed(GROUP, "taskCount", json!(0)), "taskGroups[0].taskCount", "range"),
        (changed(GROUP, "schedulingPolicy", json!("IN_ORDER")), "taskGroups[0].parallelism", "IN_ORDER"),
        (changed(GROUP, "runAsNonRoot", json!(true)), "taskGroups[0].runAsNonRoot", "not supported"),
        (changed("", "logsPolicy", json!({"destination": "PATH"})), "logsPolicy.logsPath", "absolute"),
        (changed(GROUP, "taskSpec", json!([])), "taskGroups[0].taskSpec", "not a list"),
        (json!([]), "document", "not a list"),
        (changed("", "priority", json!(100)), "priority", "0 to 99"),
    ];
    for (document, path, message) in table {
        let said = verdict_on(&document, false).expect_err(path);
        assert!(said.contains(path) && said.contains(message), "{path}, {message}: {said}");
    }
}

#[test]
fn relaxed_streams_with_the_other_fields_too() {
    let document = changed(CONTAINER, "options", json!("--network none -e A=1"));
    assert!(verdict_on(&document, true).is_ok());
    let mut document = changed(CONTAINER, "username", json!("me"));
    assert!(verdict_on(&document, true).unwrap_err().contains("needed together"));
    document["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["password"] = json!("secret");
    assert_eq!(verdict_on(&document, true).unwrap().len(), 3);
    document["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["password"] =
        json!("projects/p/secrets/s/versions/1");
    assert!(verdict_on(&document, true).unwrap_err().contains("Secret Manager"));
    let document = changed(CONTAINER, "options", json!("--privileged"));
    assert!(verdict_on(&document, true).unwrap_err().contains("--privileged"));
}

#[test]
fn environments_and_what_comes_over_what() {
    let mut document =
        changed(SPEC, "environment", json!({"variables": {"A": "task", "B": "task", "C": "task"}}));
    document["taskGroups"][0]["taskEnvironments"] = json!([{}, {"variables": {"B": "one", "C": "one"}}]);
    document["taskGroups"][0]["taskSpec"]["runnables"][0]["environment"] =
        json!({"variables": {"C": "step"}});
    let plan = Plan::of(&parse(document.to_string().as_bytes()).unwrap(), 8).unwrap();
    assert_eq!((plan.task_count, plan.parallelism), (2, 2));
    let around = Surroundings { job_uid: "u".to_owned(), ..Surroundings::default() };
    let env = plan.variables(&plan.steps[0], 1, 3, &around);
    let wanted = [
        ("A", "task"),
        ("B", "one"),
        ("C", "step"),
        ("BATCH_TASK_INDEX", "1"),
        ("BATCH_TASK_COUNT", "2"),
        ("BATCH_TASK_RETRY_ATTEMPT", "3"),
        ("BATCH_JOB_UID", "u"),
    ];
    for (key, value) in wanted {
        assert_eq!(env[key], value, "{key}");
    }
}

#[test]
fn volumes_of_devices() {
    let mut document = changed(SPEC, "volumes", json!([{"deviceName": "d", "mountPath": "/mnt/d"}]));
    let binds = |document: &Value| {
        let job = parse(document.to_string().as_bytes()).unwrap();
        let container =
            job.task_groups[0].task_spec.as_ref().unwrap().runnables[0].container.clone().unwrap();
        Plan::of(&job, 8).unwrap().binds(&container, "/v")
    };
    assert_eq!(binds(&document), ["/v/d:/mnt/d"]);
    document["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]["volumes"] =
        json!(["/mnt/d/sub:/x:ro", "/mnt/down:/y"]);
    assert_eq!(binds(&document), ["/v/d/sub:/x:ro", "/mnt/down:/y"]);
}

#[test]
fn retries_follow_the_policy() {
    let plan = |policies: Value| {
        let mut document = changed(SPEC, "maxRetryCount", json!(2));
        document["taskGroups"][0]["taskSpec"]["lifecyclePolicies"] = policies;
        Plan::of(&parse(document.to_string().as_bytes()).unwrap(), 8).unwrap()
    };
    let policy = |action: &str| json!([{"action": action, "actionCondition": {"exitCodes": [7]}}]);
    let table = [
        (json!([]), Outcome::Well, 0, Verdict::Succeed),
        (json!([]), Outcome::Failed(1), 0, Verdict::Retry),
        (json!([]), Outcome::Failed(1), 1, Verdict::Retry),
        (json!([]), Outcome::Failed(1), 2, Verdict::Fail),
        (json!([]), Outcome::Cancelled, 0, Verdict::Fail),
        (policy("FAIL_TASK"), Outcome::Failed(7), 0, Verdict::Fail),
        (policy("FAIL_TASK"), Outcome::Failed(8), 0, Verdict::Retry),
        (policy("RETRY_TASK"), Outcome::Failed(7), 0, Verdict::Retry),
        (policy("RETRY_TASK"), Outcome::Failed(8), 0, Verdict::Fail),
    ];
    for (policies, outcome, retries, wanted) in table {
        assert_eq!(
            verdict(&plan(policies.clone()), outcome, retries),
            wanted,
            "{policies} {outcome:?} {retries}"
        );
    }
}

#[test]
fn final_states_only_become_deleted() {
    for state in [JobState::Succeeded, JobState::Failed, JobState::Cancelled] {
        assert!(state.is_final() && state.may_become(JobState::DeletionInProgress));
        assert!(!state.may_become(JobState::Running));
    }
    assert!(
        JobState::Queued.may_become(JobState::Scheduled) && !JobState::Queued.may_become(JobState::Succeeded)
    );
}

#[test]
fn identifiers() {
    for (id, valid) in [
        ("a", true),
        ("job-1", true),
        ("", false),
        ("1a", false),
        ("a-", false),
        ("A", false),
        ("../x", false),
    ] {
        assert_eq!(valid_job_id(id), valid, "{id}");
    }
    assert!(!valid_job_id(&"a".repeat(64)));
}

#[test]
fn a_kubernetes_job() {
    let mut document = streaming();
    let spec = &mut document["taskGroups"][0]["taskSpec"];
    spec["maxRetryCount"] = json!(3);
    spec["maxRunDuration"] = json!("90.5s");
    spec["computeResource"] = json!({"cpuMilli": 500, "memoryMib": 256});
    spec["lifecyclePolicies"] = json!([{"action": "FAIL_TASK", "actionCondition": {"exitCodes": [42]}}]);
    spec["volumes"] = json!([{"deviceName": "d", "mountPath": "/mnt/d"}]);
    spec["runnables"].as_array_mut().unwrap().insert(0, json!({"script": {"text": "echo first"}}));
    let job = parse(document.to_string().as_bytes()).unwrap();
    let made = serde_json::to_value(to_kubernetes(&job, "demo").unwrap()).unwrap();
    let pod = &made["spec"]["template"]["spec"];
    assert_eq!(made["metadata"]["name"], "demo");
    assert_eq!(made["spec"]["completionMode"], "Indexed");
    assert_eq!((&made["spec"]["completions"], &made["spec"]["parallelism"]), (&json!(4), &json!(2)));
    assert_eq!(made["spec"]["backoffLimitPerIndex"], 3);
    assert_eq!(
        made["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"],
        json!({"operator": "In", "values": [42]})
    );
    assert_eq!(pod["nodeSelector"], json!({"sluice.dev/image-streaming": "true"}));
    assert_eq!(pod["activeDeadlineSeconds"], 91);
    assert_eq!(pod["initContainers"][0]["command"], json!(["/bin/sh", "-c", "echo first"]));
    let main = &pod["containers"][0];
    assert_eq!(main["image"], "registry.example/app:1");
    assert_eq!(main["command"], json!(["/bin/sh"]));
    assert_eq!(main["resources"]["limits"], json!({"cpu": "500m", "memory": "256Mi"}));
    assert_eq!(main["volumeMounts"][0]["mountPath"], "/mnt/d");
    assert_eq!(pod["volumes"], json!([{"name": "disk-0", "emptyDir": {}}]));
    document["taskGroups"][0]["taskSpec"]["runnables"][1]["alwaysRun"] = json!(true);
    let said =
        to_kubernetes(&parse(document.to_string().as_bytes()).unwrap(), "demo").unwrap_err().to_string();
    assert!(said.contains("runnables[1].alwaysRun"), "{said}");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[0-9]{1,3}(\\.[0-9]{1,10})?s".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        let name = prop_oneof![
            "[a-zA-Z]{1,8}".prop_map(String::from),
            Just("taskGroups".to_owned()),
            Just("taskSpec".to_owned()),
            Just("runnables".to_owned()),
            Just("container".to_owned()),
            Just("volumes".to_owned()),
            Just("environment".to_owned()),
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name, inner, 0..4).prop_map(|map| map.into_iter().collect()),
        ]
    })
}

/// Every place of the example.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), all))
        }
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), all))
        }
        _ => {}
    }
}

proptest! {
    #[test]
    fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(parse(&bytes));
    }

    #[test]
    fn arbitrary_json_never_panics_and_errors_name_a_path(value in any_json(), place in any::<prop::sample::Index>(), relaxed: bool) {
        let mut places = Vec::new();
        pointers(&streaming(), "", &mut places);
        let mut document = streaming();
        let places = places.as_slice();
        *document.pointer_mut(place.get(places).as_str()).unwrap() = value;
        let problems = match parse(document.to_string().as_bytes()) {
            Err(JobError::Document(problem)) => vec![problem],
            Err(other) => panic!("{other}"),
            Ok(job) => match job.check(relaxed) {
                Ok(_) => {
                    drop(Plan::of(&job, 4));
                    drop(to_kubernetes(&job, "x"));
                    Vec::new()
                }
                Err(JobError::Rules(problems)) => problems,
                Err(other) => panic!("{other}"),
            },
        };
        for problem in problems {
            let first = problem.path.split(['.', '[']).next().unwrap().to_owned();
            // What is required is named by its path where it is missing.
            let known = ["document", "taskGroups"].contains(&first.as_str());
            prop_assert!(known || document.get(&first).is_some(), "{problem} in {document}");
        }
    }

    #[test]
    fn a_misspelt_field_is_named_wherever_it_is(place in any::<prop::sample::Index>()) {
        let mut places = Vec::new();
        pointers(&streaming(), "", &mut places);
        places.retain(|place| streaming().pointer(place).unwrap().is_object());
        let place = place.get(&places);
        let said = verdict_on(&changed(place, "misspelt", json!(1)), false).unwrap_err();
        let mut path = String::new();
        for part in place.split('/').skip(1) {
            match part.parse::<usize>() {
                Ok(number) => path.push_str(&format!("[{number}]")),
                Err(_) => path.push_str(&format!("{}{part}", if path.is_empty() { "" } else { "." })),
            }
        }
        let path = if path.is_empty() { "misspelt".to_owned() } else { format!("{path}.misspelt") };
        prop_assert!(said.starts_with(&format!("{path}: ")), "{path}: {said}");
    }
}
