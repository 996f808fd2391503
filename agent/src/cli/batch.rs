//! `sluice batch`: its part of the command line.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

#[derive(Debug, Subcommand)]
pub(crate) enum BatchAction {
    /// Check a job document, and say what of it is not applied here
    Validate {
        /// The job as JSON; `-` is standard input
        file: PathBuf,
        /// Support streamed containers with the fields that the reference ignores there
        #[arg(long)]
        relaxed: bool,
    },
    /// Submit a job; it runs on when this command has ended
    Submit(SubmitArgs),
    /// List jobs
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a job: its state, its events, and how each task went
    Describe {
        /// Identifier of the job
        job: String,
        /// As JSON, in the form of the reference
        #[arg(long)]
        json: bool,
    },
    /// Show the output of a job's runnables
    Logs {
        /// Identifier of the job
        job: String,
        /// Only of this task
        #[arg(long, value_name = "INDEX")]
        task: Option<usize>,
        /// As JSON, one object a line
        #[arg(long)]
        json: bool,
        /// Go on until the job is over
        #[arg(short, long)]
        follow: bool,
    },
    /// End a job; what is known of it stays
    Cancel {
        /// Identifier of the job
        job: String,
    },
    /// End a job if it runs, and forget it
    Delete {
        /// Identifier of the job
        job: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SubmitArgs {
    /// The job as JSON; `-` is standard input
    pub(crate) file: PathBuf,
    /// Identifier of the job [default: one is made up]
    #[arg(long, value_name = "ID")]
    pub(crate) job_id: Option<String>,
    /// Support streamed containers with the fields that the reference ignores there
    #[arg(long)]
    pub(crate) relaxed: bool,
    /// Wait until the job is over; the exit code is 1 if it did not succeed
    #[arg(long)]
    pub(crate) wait: bool,
    /// Processors of each task, instead of the document's
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<f64>,
    /// Memory of each task in MiB, instead of the document's
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<i64>,
    /// Where it runs
    #[arg(long, value_enum, default_value_t = Target::Local)]
    pub(crate) target: Target,
    /// With --target kubernetes: print the objects instead of making them
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// With --target kubernetes: the cluster's namespace [default: the context's]
    #[arg(long, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// With --target kubernetes: configuration file [default: KUBECONFIG, ~/.kube/config, or the pod's own]
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// With --target kubernetes: context of the configuration [default: the current one]
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

/// Where a job runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// On this machine
    Local,
    /// On a cluster, as an indexed Job
    Kubernetes,
}
