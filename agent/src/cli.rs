//! The command line, in one definition: help texts, man pages and shell completions all come from here.

mod batch;
mod traces;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::logging::LogFormat;
pub(crate) use batch::{BatchAction, SubmitArgs, Target};
pub(crate) use traces::{ExportArgs, OtlpProtocol, RegressArgs, TraceAction, TraceFormat};

/// Streams container images: start a container while its image is still in the registry.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, about, propagate_version = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes; they override the configuration file.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Configuration file [default: /etc/sluice/config.toml, if there]
    #[arg(long, global = true, value_name = "FILE", env = "SLUICE_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// Directory of the layer store [default: /var/lib/sluice]
    #[arg(long, global = true, value_name = "DIR", env = "SLUICE_ROOT")]
    pub(crate) root: Option<PathBuf>,
    /// Directory of sockets and mounts [default: /run/sluice]
    #[arg(long, global = true, value_name = "DIR", env = "SLUICE_STATE")]
    pub(crate) state: Option<PathBuf>,
    /// Speak http to this registry, or to all with no value given
    #[arg(long, global = true, value_name = "HOST", num_args = 0..=1, default_missing_value = "*", require_equals = true)]
    pub(crate) plain_http: Vec<String>,
    /// Do the work in this process instead of in the daemon
    #[arg(long, global = true)]
    pub(crate) standalone: bool,
    /// How the log is written [default: text]
    #[arg(long, global = true, value_name = "FORMAT", env = "SLUICE_LOG_FORMAT")]
    pub(crate) log_format: Option<LogFormat>,
    /// More log output: -v is info, -vv debug (SLUICE_LOG takes a filter)
    #[arg(long = "verbose", global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a container from an image
    Run(RunArgs),
    /// Mount an image's root file system, read-only
    Mount {
        /// Image reference
        image: String,
        /// Where to mount it
        dir: PathBuf,
        /// Pull the image the ordinary way
        #[arg(long)]
        no_stream: bool,
    },
    /// Unmount what `mount` mounted
    Umount {
        /// The directory given to `mount`
        dir: PathBuf,
    },
    /// Build an image's stream index and publish it beside the image
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Index {
        #[command(subcommand)]
        action: Option<IndexAction>,
        #[command(flatten)]
        args: IndexArgs,
    },
    /// Tell whether an image can be streamed, from what, layer by layer
    Check {
        /// Image reference
        image: String,
        /// Where stream indexes are kept: file://, s3://, gs:// or az:// [default: the registry]
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
    /// Bring all of an image to this node, in the background order
    Pull {
        /// Image reference
        image: String,
    },
    /// Show images on this node: state, bytes, what is waiting
    Status {
        /// Only this image
        image: Option<String>,
        /// Refresh until interrupted
        #[arg(long)]
        watch: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Forget an image that nothing uses
    Rm {
        /// Image reference or manifest digest
        image: String,
    },
    /// Free what no image needs: layers, stale mounts, loop devices
    Gc,
    /// Check the layer store: every verified chunk is read and compared with its digest
    Fsck,
    /// Tell what this node can do, capability by capability; the exit code is 1 if nothing can be streamed
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Pull an image into containerd with the labels that its snapshotter needs to stream it
    CtrPull(CtrPullArgs),
    /// Tell a Kubernetes cluster what happens on this node: Events, and the label sluice.dev/image-streaming
    Kubernetes {
        /// The Node's name
        #[arg(long, env = "NODE_NAME")]
        node: String,
    },
    /// Show what happened to images on this node
    Events {
        /// Go on with what happens from now on
        #[arg(short, long)]
        follow: bool,
        /// As JSON, one object a line
        #[arg(long)]
        json: bool,
    },
    /// Traces of containers' starts: record, list, show, export, report
    Trace {
        #[command(subcommand)]
        action: TraceAction,
    },
    /// Find what became worse from one set of starts to another; the exit code is 2 if something did
    Regress(RegressArgs),
    /// Profiles: what starts of an image read, in which order
    Profile {
        #[command(subcommand)]
        action: ProfileAction,
    },
    /// Keys that sign stream indexes
    Key {
        #[command(subcommand)]
        action: KeyAction,
    },
    /// Google Batch jobs, on this machine or a Kubernetes cluster
    Batch {
        #[command(subcommand)]
        action: BatchAction,
    },
    /// Run a job that was submitted
    #[command(hide = true)]
    BatchRunner {
        /// Identifier of the job
        job: String,
    },
    /// Switch streaming of new images on or off, or end all that is streamed
    Node {
        #[command(subcommand)]
        action: NodeAction,
    },
    /// Run the node's daemon in the foreground
    Daemon {
        /// Print `ready` on standard output once the socket is open
        #[arg(long, hide = true)]
        announce: bool,
    },
    /// Start the daemon, and again whenever it dies
    #[command(hide = true)]
    KeepDaemon,
    /// Stop the daemon; containers go on, and reads of what is not local wait for the next one
    Stop,
    /// Have another version of this program take the daemon's place; no read fails
    Upgrade {
        /// The program [default: what is where the daemon's own was started from]
        program: Option<PathBuf>,
    },
    /// Tell whether this program can take the place of a daemon
    #[command(hide = true)]
    CanFollow {
        /// Version of the protocol that the daemon's server of block files speaks
        protocol: u64,
    },
    /// Serve block files, whichever daemon comes and goes
    #[command(hide = true)]
    BlockServer,
    /// Merge the layers of an image, for the daemon
    #[command(hide = true)]
    WriteMetadata,
    /// Serve a directory of OCI layouts as a registry
    Registry(RegistryArgs),
    /// Write the man pages into a directory
    Man {
        /// Directory
        dir: PathBuf,
    },
    /// Print the completion script of a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Pull and unpack the whole image first, the ordinary way
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Bind SRC of the node to DST in the container
    #[arg(short, long = "volume", value_name = "SRC:DST[:ro]")]
    pub(crate) volumes: Vec<String>,
    /// Set an environment variable
    #[arg(short, long = "env", value_name = "KEY=VALUE")]
    pub(crate) env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User: name or number, with group after a colon
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Replace the image's entry point
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// Network of the container
    #[arg(long, value_enum, default_value_t = Network::Host)]
    pub(crate) network: Network,
    /// Keep what the container wrote, and print where
    #[arg(long, conflicts_with = "rm")]
    pub(crate) keep: bool,
    /// Remove what the container wrote (the default)
    #[arg(long)]
    pub(crate) rm: bool,
    /// OCI runtime [default: runc, else crun]
    #[arg(long, value_name = "PATH")]
    pub(crate) runtime: Option<PathBuf>,
    /// Write how the image came to this file when the container ended, as JSON
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) report: Option<PathBuf>,
    /// Control group that the container's is made in [default: /sluice]
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_parent: Option<String>,
    /// End when this process, which is the parent, does
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) parent: Option<i32>,
    #[command(flatten)]
    pub(crate) ready: ReadyArgs,
    /// Image reference
    pub(crate) image: String,
    /// Command and arguments instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// When a container's start is over and no longer recorded; else when it ends, or when the time is up.
#[derive(Debug, Default, Args)]
pub(crate) struct ReadyArgs {
    /// The start is over when this port of the node answers
    #[arg(long, value_name = "PORT")]
    pub(crate) ready_port: Option<u16>,
    /// The start is over when a line of the container's output matches
    #[arg(long, value_name = "REGEX")]
    pub(crate) ready_log: Option<String>,
    /// The start is over when this command succeeds in the container
    #[arg(long, value_name = "COMMAND")]
    pub(crate) ready_exec: Option<String>,
    /// The start is over after so long at most, e.g. 10s [default: as configured]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) ready_timeout: Option<std::time::Duration>,
}

/// Network of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Network {
    /// The node's
    Host,
    /// Loopback only
    None,
}

#[derive(Debug, Args)]
pub(crate) struct IndexArgs {
    /// Image reference
    #[arg(required = true)]
    pub(crate) image: Option<String>,
    /// Where to publish: file://, s3://, gs:// or az:// [default: the registry, as a referrer]
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Build and measure, publish nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Sign it with this private key (PEM, Ed25519) [default: sign_key of the configuration]
    #[arg(long, value_name = "KEY")]
    pub(crate) sign: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyAction {
    /// Make NAME.key, which signs stream indexes, and NAME.pub, which nodes trust
    Generate {
        /// Path without extension
        #[arg(default_value = "sluice")]
        name: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CtrPullArgs {
    /// Image reference
    pub(crate) image: String,
    /// containerd's socket [default: /run/containerd/containerd.sock]
    #[arg(short, long, value_name = "SOCKET")]
    pub(crate) address: Option<PathBuf>,
    /// containerd's namespace
    #[arg(short, long, default_value = "default")]
    pub(crate) namespace: String,
    /// containerd's name of the snapshotter
    #[arg(long, value_name = "NAME", default_value = "sluice")]
    pub(crate) snapshotter: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub(crate) enum NodeAction {
    /// Stream new images
    Enable,
    /// Pull new images the ordinary way
    Disable,
    /// Tell whether new images are streamed
    Status,
    /// Unmount all images and stop the daemon: what still reads an image that is not local fails
    Drain,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ProfileAction {
    /// List the node's profiles
    List {
        /// Only of this image
        image: Option<String>,
    },
    /// Show what the profiles of an image fetch, in order
    Show {
        /// Image reference
        image: String,
    },
    /// Publish the profiles of an image, united with what is published
    Push {
        /// Image reference
        image: String,
        /// With a start pack each: one blob of exactly the profile's bytes, in order
        #[arg(long)]
        pack: bool,
    },
    /// Bring the published profile of an image to this node
    Pull {
        /// Image reference
        image: String,
        /// The entry point that replaces the image's
        #[arg(long, value_name = "COMMAND")]
        entrypoint: Option<String>,
        /// Command and arguments instead of the image's
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Remove the node's profiles of an image
    Rm {
        /// Image reference
        image: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IndexAction {
    /// Show the published index of an image
    Show {
        /// Image reference
        image: String,
        /// Where it is kept [default: the registry]
        #[arg(long, value_name = "URL")]
        store: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// An OCI layout, or a directory of them (repository = relative path)
    pub(crate) dir: PathBuf,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:5000")]
    pub(crate) listen: std::net::SocketAddr,
    /// Rate of the link that all clients share, e.g. 1gbit, 200mbit
    #[arg(long, value_parser = parse_rate)]
    pub(crate) rate: Option<u64>,
    /// Round-trip time of the link, e.g. 2ms
    #[arg(long, value_parser = parse_duration, default_value = "0ms")]
    pub(crate) delay: std::time::Duration,
    /// Faults for trials, as JSON (see docs/trials.md)
    #[arg(long, value_name = "JSON")]
    pub(crate) faults: Option<String>,
    /// Answer 404 to the referrers API, as older registries do
    #[arg(long)]
    pub(crate) no_referrers_api: bool,
}

/// Bits per second from `1gbit`, `200mbit`, `64kbit` or a plain number.
fn parse_rate(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (number, factor) = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1_000), ("bit", 1)]
        .iter()
        .find_map(|(suffix, factor)| lower.strip_suffix(suffix).map(|number| (number, *factor)))
        .unwrap_or((&lower, 1));
    let number: f64 = number
        .trim()
        .parse()
        .map_err(|error| format!("`{text}` is not a rate like 1gbit or 200mbit: {error}"))?;
    if number <= 0.0 {
        return Err("a rate is more than zero".to_owned());
    }
    Ok((number * f64::from(factor)) as u64)
}

/// A duration from `2ms`, `1.5s` or `500us`.
fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let (number, scale) = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)]
        .iter()
        .find_map(|(suffix, scale)| text.strip_suffix(suffix).map(|number| (number, *scale)))
        .ok_or_else(|| format!("`{text}` has no unit: write 2ms or 1s"))?;
    let number: f64 =
        number.trim().parse().map_err(|error| format!("`{text}` is not a duration like 2ms: {error}"))?;
    std::time::Duration::try_from_secs_f64(number * scale).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rates_and_durations() {
        assert_eq!(parse_rate("1gbit"), Ok(1_000_000_000));
        assert_eq!(parse_rate("0.5mbit"), Ok(500_000));
        assert_eq!(parse_rate("64"), Ok(64));
        assert!(parse_rate("fast").is_err());
        assert_eq!(parse_duration("2ms"), Ok(std::time::Duration::from_millis(2)));
        assert!(parse_duration("2").is_err());
    }

    #[test]
    fn a_command_may_begin_with_dashes() {
        let cli = Cli::parse_from(["sluice", "run", "-e", "A=1", "img", "sh", "-c", "echo -v"]);
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.command, ["sh", "-c", "echo -v"]);
        assert_eq!(run.env, ["A=1"]);
    }

    #[test]
    fn index_takes_an_image_or_show() {
        let cli = Cli::parse_from(["sluice", "index", "img", "--dry-run"]);
        assert!(matches!(cli.command, Command::Index { action: None, .. }));
        let cli = Cli::parse_from(["sluice", "index", "show", "img"]);
        assert!(matches!(cli.command, Command::Index { action: Some(IndexAction::Show { .. }), .. }));
        assert!(Cli::try_parse_from(["sluice", "index"]).is_err());
    }
}
