//! `cargo xtask soak`: a node under faults of all kinds, with what must always hold checked all the time.
//!
//! One seed gives the images, the order of faults and what each worker does next. Threads run as they like, so two runs
//! of a seed are alike, not equal. Exit code 1 if anything was violated.

pub(crate) mod disk;
mod faults;
mod of_node;
mod random;
mod room;
mod watch;
mod worker;
mod world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

use self::random::Random;
use self::world::World;

/// Options of the soak.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long faults are injected
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// Repeats a run [default: by the clock; it is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Only faults of the registry, none of the disk or the daemon
    #[arg(long)]
    registry_only: bool,
    /// Only these faults, by their names in the summary
    #[arg(long = "fault", value_delimiter = ',')]
    faults: Vec<String>,
    /// All faults but these
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
    /// The binary is built as for tests, not as a release
    #[arg(long)]
    debug: bool,
    /// An existing binary of sluice instead
    #[arg(long, conflicts_with = "debug")]
    binary: Option<std::path::PathBuf>,
    /// In a mount namespace of its own already
    #[arg(long, hide = true)]
    inside: bool,
}

/// Threads that read.
const WORKERS: u64 = 4;
/// After the last fault everything is complete within this time.
const CONVERGES: Duration = Duration::from_secs(180);
/// When this much longer than it should have taken has passed, it is ended by force.
const HANGS: Duration = Duration::from_secs(300);
/// Violations that are printed.
const SHOWN: usize = 20;

/// What was done, and what was found wrong.
#[derive(Debug)]
pub(crate) struct Tally {
    seed: u64,
    began: Instant,
    operations: Mutex<BTreeMap<&'static str, u64>>,
    faults: Mutex<BTreeMap<&'static str, u64>>,
    violations: Mutex<Vec<String>>,
    /// Once set, everybody comes to an end.
    pub(crate) over: AtomicBool,
}

impl Tally {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            began: Instant::now(),
            operations: Mutex::default(),
            faults: Mutex::default(),
            violations: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(crate) fn operation(&self, name: &'static str) {
        *lock(&self.operations).entry(name).or_default() += 1;
    }

    /// All operations until now.
    pub(crate) fn done(&self) -> u64 {
        lock(&self.operations).values().sum()
    }

    pub(crate) fn fault(&self, name: &'static str) {
        *lock(&self.faults).entry(name).or_default() += 1;
    }

    pub(crate) fn violated(&self, what: &str) {
        let at = self.began.elapsed().as_secs_f64();
        let what = format!("{at:.1} s, seed {}: {what}", self.seed);
        eprintln!("VIOLATION: {what}");
        lock(&self.violations).push(what);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Runs it and prints the verdict.
pub(crate) fn soak(args: &Args) -> Result<()> {
    if !args.inside {
        crate::packages::install(&crate::packages::RUNTIME)?;
        crate::packages::install(&crate::packages::SOAK)?;
        return room::enter();
    }
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = args.seed.unwrap_or_else(|| clock.subsec_nanos().into());
    println!("soak: seed {seed}, {} minutes", args.minutes);
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None if args.debug => crate::sluice::build_for_tests()?,
        None => crate::sluice::build()?,
    };
    let world = World::make(&binary, &mut Random::new(seed))?;
    let tally = Tally::new(seed);
    let began = Instant::now();
    let end = began + Duration::from_secs_f64(args.minutes * 60.0);
    let wanted = faults::wanted(args.registry_only, &args.faults, &args.without)?;
    let peaks = std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch::watch(&world, &tally, end + CONVERGES * 4 + HANGS));
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                let random = Random::new(seed.wrapping_add(1 + number));
                let (world, tally) = (&world, &tally);
                scope.spawn(move || worker::work(world, tally, number, random, end))
            })
            .collect();
        faults::inject(&world, &tally, &mut Random::new(seed ^ 0xfa01), end, &wanted);
        for worker in workers {
            if worker.join().is_err() {
                tally.violated("a worker panicked");
            }
        }
        converge(&world, &tally);
        tally.over.store(true, Ordering::Relaxed);
        watching.join().unwrap_or_default()
    });
    let log = world.log();
    if let Err(error) = world.end() {
        tally.violated(&format!("it does not come to an end: {error:#}"));
    }
    report(&tally, seed, began.elapsed(), peaks, &log)
}

/// With no fault left everything becomes local, and is what it should be.
fn converge(world: &World, tally: &Tally) {
    let began = Instant::now();
    for (number, image) in world.images().iter().enumerate() {
        if let Err(error) = worker::settle(world, tally, image, number, CONVERGES) {
            tally.violated(&format!("{} does not converge: {error:#}", image.name));
        }
    }
    println!(
        "soak: all images local and compared {:.1} s after the last fault",
        began.elapsed().as_secs_f64()
    );
    // Files that were removed from a layer which the kernel reads by itself are missed by nobody before. Nothing else may be found.
    let removed = |said: &String| {
        let mut problems = said.lines().filter(|line| line.starts_with("layer ")).peekable();
        problems.peek().is_some() && problems.all(|line| line.contains("files of it are gone"))
    };
    match world.fsck().and_then(|said| if removed(&said) { world.fsck() } else { Ok(said) }) {
        Ok(said) if said.trim_end().ends_with(" 0 problems") => {}
        Ok(said) => tally.violated(&format!("fsck: {said}")),
        Err(error) => tally.violated(&format!("fsck: {error:#}")),
    }
}

fn report(tally: &Tally, seed: u64, took: Duration, peaks: watch::Peaks, log: &str) -> Result<()> {
    let list = |counts: &Mutex<BTreeMap<&'static str, u64>>| {
        let counts = lock(counts);
        let words: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        (counts.values().sum::<u64>(), words.join(", "))
    };
    let ((operations, by_operation), (faults, by_fault)) = (list(&tally.operations), list(&tally.faults));
    println!("operations: {operations} ({by_operation})");
    println!("faults:     {faults} ({by_fault})");
    println!(
        "peaks:      {} MiB resident, {} descriptors (limits {} and {})",
        peaks.resident_bytes >> 20,
        peaks.descriptors,
        watch::RESIDENT_LIMIT >> 20,
        watch::DESCRIPTOR_LIMIT
    );
    let violations = lock(&tally.violations);
    println!("violations: {} (seed {seed}, {:.0} s)", violations.len(), took.as_secs_f64());
    if violations.is_empty() {
        return Ok(());
    }
    for violation in violations.iter().take(SHOWN) {
        println!("  {violation}");
    }
    let path = crate::run::target().join("sluice-soak.log");
    std::fs::write(&path, log)?;
    bail!("something that must always hold did not; the daemon's log is in {}", path.display())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
