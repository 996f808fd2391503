//! Google Batch job documents (REST reference v1): types, rules, the plan of tasks, their states, and Kubernetes Jobs.
//!
//! Pure: it reads no file, starts nothing and knows no clock. The agent runs what is planned here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic"))]

mod allocation;
mod cluster_state;
mod job;
mod kubernetes;
mod number;
mod plan;
mod record;
mod state;
mod validate;

pub use allocation::*;
pub use cluster_state::{from_kubernetes, pod_index};
pub use job::*;
pub use kubernetes::{KubernetesError, MANAGED_BY, STREAMING_LABEL, to_kubernetes};
pub use number::{Int64, Seconds};
pub use plan::{Bind, DockerOptions, Plan, RunKind, Step, Surroundings, Variables, docker_options};
pub use record::{Change, ImageReport, Record};
pub use state::{
    JobState, JobStatus, NOT_HEARD_OF, Outcome, REBOOTED, StatusEvent, TIMED_OUT, TaskExecution, TaskState,
    TaskStatus, UNKNOWN_FAILURE, Verdict, verdict,
};
pub use validate::{Checked, JobError, MAX_DOCUMENT_BYTES, Note, Problem, parse, valid_job_id};
