//! kubelet's credential provider plugins: programs that are given an image and answer with credentials (the exec protocol,
//! `credentialprovider.kubelet.k8s.io/v1`), configured by the same file as kubelet's.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_registry::Credentials;

use super::matching::{matches, weight};
use super::secrets::entry_credentials;

const API: &str = "credentialprovider.kubelet.k8s.io/v1";
/// kubelet's own limit.
const PATIENCE: Duration = Duration::from_secs(60);
/// Answers are a few KiB.
const MAX_ANSWER: u64 = 1 << 20;

/// kubelet's `CredentialProviderConfig`, as far as it concerns us; YAML, hence JSON too.
#[derive(Debug, Deserialize)]
struct File {
    providers: Vec<Provider>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    /// Needs a pod's service account, which only kubelet has.
    #[serde(default)]
    token_attributes: Option<Value>,
}

#[derive(Debug, Clone, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    api_version: String,
    kind: String,
    cache_key_type: String,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<HashMap<String, Value>>,
}

/// What a plugin said.
#[derive(Debug, Clone)]
struct Known {
    auth: Arc<Vec<(String, Credentials)>>,
    /// From here on it is asked again; if it fails, what it said counts until `end`.
    renew: Instant,
    end: Instant,
}

/// See the module text.
#[derive(Debug)]
pub(super) struct Providers {
    programs: PathBuf,
    all: Vec<Provider>,
    /// By provider and what its answer is good for.
    known: Mutex<HashMap<(String, String), Known>>,
    /// One run at a time: everybody who waits needs the same answer.
    running: Mutex<()>,
}

impl Providers {
    /// Reads kubelet's configuration; plugins are programs of their names in `programs`.
    pub(super) fn read(file: &Path, programs: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let parsed: File = serde_saphyr::from_str(&text)
            .with_context(|| format!("{} is not a CredentialProviderConfig", file.display()))?;
        for provider in &parsed.providers {
            duration(&provider.default_cache_duration)
                .with_context(|| format!("{}: defaultCacheDuration of {}", file.display(), provider.name))?;
            if provider.name.contains('/') || provider.name.starts_with('.') {
                bail!("{}: `{}` is no program's name", file.display(), provider.name);
            }
        }
        let usable = |provider: &Provider| {
            let reason = match () {
                () if provider.api_version != API => "its version of the protocol is not known here",
                () if provider.token_attributes.is_some() => "it needs a pod's service account token",
                () => return true,
            };
            tracing::warn!(provider = provider.name, reason, "a credential provider is not used");
            false
        };
        Ok(Self {
            programs: programs.to_path_buf(),
            all: parsed.providers.into_iter().filter(usable).collect(),
            known: Mutex::default(),
            running: Mutex::default(),
        })
    }

    /// Credentials for a repository from every plugin that is responsible, the most particular first.
    pub(super) fn get(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let mut found = Vec::new();
        for provider in &self.all {
            if !provider.match_images.iter().any(|pattern| matches(pattern, host, repository)) {
                continue;
            }
            match self.ask(provider, host, repository) {
                Ok(auth) => {
                    let fitting = auth.iter().filter(|(pattern, _)| matches(pattern, host, repository));
                    found.extend(fitting.cloned());
                }
                Err(error) => {
                    let (provider, error) = (&provider.name, format!("{error:#}"));
                    tracing::warn!(provider, error, "a credential provider gave nothing");
                }
            }
        }
        found.sort_by_key(|(pattern, _)| std::cmp::Reverse(weight(pattern)));
        found.into_iter().map(|(_, credentials)| credentials).collect()
    }

    fn ask(
        &self,
        provider: &Provider,
        host: &str,
        repository: &str,
    ) -> Result<Arc<Vec<(String, Credentials)>>> {
        let image = format!("{host}/{repository}");
        let now = Instant::now();
        if let Some(known) = self.lookup(&provider.name, host, &image).filter(|known| known.renew > now) {
            return Ok(known.auth);
        }
        let _alone = lock(&self.running);
        let known = self.lookup(&provider.name, host, &image);
        if let Some(known) = known.clone().filter(|known| known.renew > Instant::now()) {
            return Ok(known.auth);
        }
        let answer = self.run(provider, &image).and_then(|answer| self.keep(provider, host, &image, answer));
        match (answer, known.filter(|known| known.end > Instant::now())) {
            (Ok(auth), _) => Ok(auth),
            (Err(error), Some(known)) => {
                tracing::warn!(
                    provider = provider.name,
                    error = format!("{error:#}"),
                    "its former answer is used"
                );
                Ok(known.auth)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn lookup(&self, provider: &str, host: &str, image: &str) -> Option<Known> {
        let known = lock(&self.known);
        // What kubelet calls the cache key: the image, its registry, or everything.
        let keys = [image, host, "*"];
        keys.iter().find_map(|key| known.get(&(provider.to_owned(), (*key).to_owned())).cloned())
    }

    fn keep(
        &self,
        provider: &Provider,
        host: &str,
        image: &str,
        answer: Answer,
    ) -> Result<Arc<Vec<(String, Credentials)>>> {
        if answer.kind != "CredentialProviderResponse" || answer.api_version != API {
            bail!("it answered with {} {}", answer.api_version, answer.kind);
        }
        let key = match answer.cache_key_type.as_str() {
            "Image" => image,
            "Registry" => host,
            "Global" => "*",
            other => bail!("its cacheKeyType `{other}` is not known"),
        };
        let life = duration(answer.cache_duration.as_deref().unwrap_or(&provider.default_cache_duration))?;
        let auth = answer.auth.unwrap_or_default();
        let auth = auth.into_iter().filter_map(|(key, entry)| Some((key, entry_credentials(&entry)?)));
        let auth = Arc::new(auth.collect::<Vec<_>>());
        let now = Instant::now();
        let mut known = lock(&self.known);
        known.retain(|_, known| known.end > now);
        if !life.is_zero() {
            // A life no clock can hold is as good as a day.
            let end = now.checked_add(life).unwrap_or(now + Duration::from_secs(86_400));
            let renew = now + end.duration_since(now) / 5 * 4;
            known.insert(
                (provider.name.clone(), key.to_owned()),
                Known { auth: Arc::clone(&auth), renew, end },
            );
        }
        Ok(auth)
    }

    /// Runs a plugin: one document in, one out.
    fn run(&self, provider: &Provider, image: &str) -> Result<Answer> {
        let program = self.programs.join(&provider.name);
        let mut child = Command::new(&program)
            .args(&provider.args)
            .envs(provider.env.iter().map(|one| (&one.name, &one.value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let request = json!({ "apiVersion": API, "kind": "CredentialProviderRequest", "image": image });
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (said, says) = mpsc::channel();
        std::thread::spawn(move || {
            let talk = || -> Result<Vec<u8>> {
                let (mut stdin, stdout) = stdin.zip(stdout).context("no pipes")?;
                if let Err(error) = stdin.write_all(request.to_string().as_bytes()) {
                    tracing::debug!(%error, "a credential provider did not read its request");
                }
                drop(stdin);
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut std::io::Read::take(stdout, MAX_ANSWER), &mut bytes)?;
                Ok(bytes)
            };
            // Nobody listens any more after the limit.
            drop(said.send(talk()));
        });
        let bytes = says.recv_timeout(PATIENCE);
        if bytes.is_err() {
            child.kill().context("it does not end")?;
        }
        let status = child.wait()?;
        let bytes = bytes.with_context(|| format!("it did not answer within {} s", PATIENCE.as_secs()))??;
        if !status.success() {
            bail!("it ended with {status}");
        }
        // The position alone: the rest of a parser's message may quote what is there.
        serde_json::from_slice(&bytes).map_err(|error| {
            anyhow::anyhow!("its answer is not understood, line {} column {}", error.line(), error.column())
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Go's notation: `12h`, `1h30m0s`, `1.5h`, `100ms`, `0`.
fn duration(text: &str) -> Result<Duration> {
    let mut rest = text.trim();
    let mut seconds = 0.0;
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let wrong = || format!("`{text}` is no duration like 12h or 10m30s");
    while !rest.is_empty() {
        let end = rest.find(|char: char| !char.is_ascii_digit() && char != '.').with_context(wrong)?;
        let (number, after) = rest.split_at(end);
        let number: f64 = number.parse().ok().with_context(wrong)?;
        let end = after.find(|char: char| char.is_ascii_digit() || char == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        seconds += number
            * match unit {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => bail!(wrong()),
            };
        rest = after;
    }
    Duration::try_from_secs_f64(seconds).ok().with_context(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn durations_of_go() {
        for (text, wanted) in [
            ("12h", 43_200_000),
            ("1h30m0s", 5_400_000),
            ("1.5h", 5_400_000),
            ("100ms", 100),
            ("0s", 0),
            ("0", 0),
        ] {
            assert_eq!(duration(text).expect(text), Duration::from_millis(wanted), "{text}");
        }
        for text in ["12", "h", "-1h", "1d", "1h x"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    /// A plugin that counts its runs, keeps what it was asked, and does what `answer` says.
    fn plugin(dir: &Path, life: &str, answer: &str) -> Providers {
        let program = dir.join("provider");
        let script = format!(
            "#!/bin/sh\ncat > {dir}/asked\necho run >> {dir}/runs\n[ \"$1 $MODE\" = \"--quick on\" ] || exit 3\n{answer}\n",
            dir = dir.display()
        );
        std::fs::write(&program, script).expect("written");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("executable");
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n  - name: provider\n    matchImages:\n      - \"*.example\"\n    defaultCacheDuration: \"{life}\"\n    apiVersion: {API}\n    args: [--quick]\n    env:\n      - name: MODE\n        value: \"on\"\n  - name: other\n    matchImages: [\"*.example\"]\n    defaultCacheDuration: 1h\n    apiVersion: credentialprovider.kubelet.k8s.io/v1alpha1\n"
        );
        std::fs::write(dir.join("config.yaml"), config).expect("written");
        Providers::read(&dir.join("config.yaml"), dir).expect("read")
    }

    fn runs(dir: &Path) -> usize {
        std::fs::read_to_string(dir.join("runs")).map_or(0, |text| text.lines().count())
    }

    const ANSWER: &str = r#"echo '{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse","cacheKeyType":"Registry","auth":{"r.example":{"username":"u","password":"p"},"r.example/team":{"username":"t","password":"q"}}}'"#;

    #[test]
    fn a_plugin_is_asked_once_for_a_registry_as_kubelet_asks_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let providers = plugin(dir.path(), "1h", ANSWER);
        let names = |repository: &str| -> Vec<String> {
            let name = |credentials| match credentials {
                Credentials::Password(name, _) => name,
                Credentials::Identity(_) => "identity".to_owned(),
            };
            providers.get("r.example", repository).into_iter().map(name).collect()
        };
        assert_eq!(names("app"), ["u"]);
        let asked: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("asked")).expect("asked")).expect("JSON");
        assert_eq!(
            asked,
            json!({ "apiVersion": API, "kind": "CredentialProviderRequest", "image": "r.example/app" })
        );
        assert_eq!(names("team/app"), ["t", "u"]);
        assert_eq!(runs(dir.path()), 1, "the answer is good for the registry");
        assert!(providers.get("r.elsewhere", "app").is_empty());
        assert_eq!(runs(dir.path()), 1, "images of others are none of its business");
    }

    #[test]
    fn an_answer_is_renewed_before_its_end_and_outlives_a_failure() {
        let dir = tempfile::tempdir().expect("a directory");
        let answer = format!("[ -e {}/broken ] && exit 1\n{ANSWER}", dir.path().display());
        let providers = plugin(dir.path(), "1h", &answer);
        assert_eq!(providers.get("r.example", "app").len(), 1);
        // Four fifths of its life are over.
        let age = || lock(&providers.known).values_mut().for_each(|known| known.renew = Instant::now());
        age();
        assert_eq!(providers.get("r.example", "app").len(), 1);
        assert_eq!(runs(dir.path()), 2, "asked again before the end");
        std::fs::write(dir.path().join("broken"), "").expect("written");
        age();
        assert_eq!(providers.get("r.example", "app").len(), 1, "the former answer is good still");
        lock(&providers.known).values_mut().for_each(|known| known.end = Instant::now());
        assert!(providers.get("r.example", "app").is_empty(), "but not for ever");
    }

    #[test]
    fn what_is_not_to_be_cached_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let providers = plugin(dir.path(), "0s", ANSWER);
        assert_eq!(providers.get("r.example", "app").len(), 1);
        assert_eq!(providers.get("r.example", "app").len(), 1);
        assert_eq!(runs(dir.path()), 2);
    }

    #[test]
    fn bad_answers_give_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        for answer in [
            "echo nonsense",
            "exit 1",
            "echo '{\"apiVersion\":\"v2\",\"kind\":\"x\",\"cacheKeyType\":\"Image\"}'",
        ] {
            assert!(plugin(dir.path(), "1h", answer).get("r.example", "app").is_empty(), "{answer}");
        }
    }
}
