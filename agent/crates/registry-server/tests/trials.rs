//! Faults do what docs/trials.md says, and the counters count it.

#[allow(dead_code, reason = "shared by tests that do not all use all of it")]
mod support;

use std::time::Duration;

use reqwest::header::RANGE;
use sluice_registry_server::{Faults, Link, ServeError, Server, ServerConfig};
use support::{Registry, digest, http, manifest, noise, registry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MIB: usize = 1 << 20;

/// One request over a connection of its own; all that comes back until `wanted` bytes or the end.
async fn raw(registry: &Registry, path: &str, wanted: usize) -> Vec<u8> {
    let mut socket = TcpStream::connect(registry.server.address()).await.expect("a connection");
    let head = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    socket.write_all(head.as_bytes()).await.expect("sent");
    let mut out = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while out.len() < wanted {
        match socket.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(len) => out.extend_from_slice(&buffer[..len]),
        }
    }
    out
}

/// Length of the body in a whole answer.
fn body_len(answer: &[u8]) -> usize {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    answer.len() - end - 4
}

fn faults(text: &str) -> Faults {
    serde_json::from_str(text).expect("faults")
}

#[tokio::test]
async fn a_rate_of_nothing_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let started = Server::start(ServerConfig {
        root: dir.path().to_path_buf(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        link: Link { rate_bits_per_second: Some(0), round_trip: Duration::ZERO },
        faults: Faults::default(),
        referrers_api: true,
    });
    let error = started.await.expect_err("refused");
    assert!(matches!(error, ServeError::Rate), "{error:?}");
    assert!(error.to_string().contains("0 bits per second"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_break_off_at_the_byte() {
    for link in [Link::default(), Link { rate_bits_per_second: Some(50_000_000), round_trip: Duration::ZERO }]
    {
        let registry = registry(link).await;
        let small = registry.push_blob(&noise(1000)).await;
        let large = registry.push_blob(&noise(2 * MIB)).await;
        registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
        for at in [0, 1, 999, 1000, 131_072, 200_001] {
            registry.server.set_faults(Faults { truncate_at: Some(at), ..Faults::default() });
            for (path, whole) in [(small.as_str(), 1000), (&large, 2 * MIB)] {
                let cut = whole.min(at as usize);
                // Not more than is there, or a whole body would be waited for.
                let got =
                    body_len(&raw(&registry, path, if cut == whole { whole } else { usize::MAX }).await);
                assert!(got >= cut && (cut == whole || got == cut), "{got} of {whole} with {at}");
            }
        }
        registry.server.set_faults(faults(r#"{"truncate_at":10,"path":"/manifests/"}"#));
        assert_eq!(body_len(&raw(&registry, "/v2/a/b/manifests/one", usize::MAX).await), 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_stand_still_half_way_or_where_asked() {
    let registry = registry(Link::default()).await;
    let path = registry.push_blob(&noise(1000)).await;
    for (text, wanted) in [(r#"{"stall":true}"#, 500), (r#"{"stall":true,"truncate_at":7}"#, 7)] {
        registry.server.set_faults(faults(text));
        let mut got = Vec::new();
        let mut answer = registry.get(&path).await;
        let still = tokio::time::timeout(Duration::from_millis(300), async {
            while let Some(piece) = answer.chunk().await.expect("a body") {
                got.extend_from_slice(&piece);
            }
        });
        still.await.expect_err("it never ends");
        assert_eq!(got.len(), wanted, "{text}");
    }
}

#[tokio::test]
async fn one_bit_in_the_middle_of_whatever_is_read() {
    let registry = registry(Link::default()).await;
    let bytes = noise(400_001);
    let path = registry.push_blob(&bytes).await;
    registry.server.set_faults(Faults { flip: true, ..Faults::default() });
    for range in [0..400_001, 100..103, 70_000..400_000] {
        let header = format!("bytes={}-{}", range.start, range.end - 1);
        let asked = registry.http.get(registry.url(&path)).header(RANGE, header).send().await;
        let got = asked.expect("an answer").bytes().await.expect("a body");
        let differ: Vec<usize> = (0..got.len()).filter(|at| got[*at] != bytes[range.start + at]).collect();
        assert_eq!(differ, [(range.end - range.start) / 2]);
    }
}

#[tokio::test]
async fn refusals_redirects_wrong_lengths_and_slow_bodies() {
    let registry = registry(Link::default()).await;
    let path = registry.push_blob(&noise(1000)).await;
    let ask = || registry.http.get(registry.url(&path)).header(RANGE, "bytes=10-19").send();

    registry.server.set_faults(faults(r#"{"status":401,"challenge":"Basic realm=\"r\""}"#));
    let answer = ask().await.expect("an answer");
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["www-authenticate"]),
        (401, &"Basic realm=\"r\"".parse().unwrap())
    );

    registry.server.set_faults(faults(r#"{"redirect":"http://127.0.0.1:1/x","times":1}"#));
    ask().await.expect_err("it leads nowhere");
    assert!(ask().await.is_ok());

    registry.server.set_faults(faults(r#"{"wrong_length":true}"#));
    let answer = ask().await.expect("an answer");
    assert_eq!(answer.headers()["content-range"], "bytes 10-20/1000");
    answer.bytes().await.expect_err("there is no such byte");

    registry.server.set_faults(faults(r#"{"bytes_per_second":2500}"#));
    let began = std::time::Instant::now();
    assert_eq!(registry.get(&path).await.bytes().await.expect("whole").as_ref(), noise(1000));
    assert!(began.elapsed() >= Duration::from_millis(300), "{:?}", began.elapsed());
}

#[tokio::test]
async fn redirects_to_addresses_that_expire() {
    let registry = registry(Link::default()).await;
    let path = registry.push_blob(&noise(1000)).await;
    registry.server.set_faults(faults(r#"{"expires_ms":600000,"times":1}"#));
    let answer = registry.get(&path).await;
    let followed = answer.url().query().expect("a redirect").to_owned();
    assert!(answer.status() == 200 && followed.starts_with("expires="), "{followed}");
    // An address expires whatever goes wrong now.
    let expired = registry.get(&format!("{path}?expires=1000")).await;
    assert_eq!(expired.status(), 403);
    assert_eq!(registry.get(&path).await.url().query(), None);
}

#[tokio::test]
async fn one_request_in_so_many_is_always_the_same() {
    let mut hit = Vec::new();
    for _ in 0..2 {
        let registry = registry(Link::default()).await;
        let path = registry.push_blob(&noise(10)).await;
        registry.server.set_faults(faults(r#"{"status":500,"one_in":4}"#));
        let mut statuses = Vec::new();
        for _ in 0..60 {
            statuses.push(registry.get(&path).await.status().as_u16());
        }
        hit.push(statuses);
    }
    assert_eq!(hit[0], hit[1]);
    let failed = hit[0].iter().filter(|status| **status == 500).count();
    assert!((5..30).contains(&failed), "{failed} of 60");
}

#[tokio::test]
async fn only_affected_requests_are_counted() {
    let registry = registry(Link::default()).await;
    let (small, large) = (registry.push_blob(&noise(10)).await, registry.push_blob(&noise(1000)).await);
    registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    let ranged = |path: &str| registry.http.get(registry.url(path)).header(RANGE, "bytes=2-3").send();

    registry.server.set_faults(faults(r#"{"truncate_at":500,"times":1}"#));
    for path in ["/v2/a/b/manifests/one", "/v2/a/b/tags/list", &small] {
        registry.get(path).await.bytes().await.expect("whole");
    }
    registry.get(&large).await.bytes().await.expect_err("cut off");
    registry.get(&large).await.bytes().await.expect("whole again");

    registry.server.set_faults(faults(r#"{"ignore_ranges":true,"times":1}"#));
    registry.get(&large).await.bytes().await.expect("whole");
    let statuses =
        [ranged(&large).await, ranged(&large).await].map(|answer| answer.expect("an answer").status());
    assert_eq!(statuses.map(|status| status.as_u16()), [200, 206]);

    registry.server.set_faults(faults(r#"{"status":503,"times":2,"path":"/blobs/"}"#));
    assert_eq!(registry.get("/v2/a/b/manifests/one").await.status(), 200);
    for status in [503, 503, 200] {
        assert_eq!(registry.get(&small).await.status(), status);
    }

    // A request that two faults affect is counted once.
    registry.server.set_faults(faults(r#"{"ignore_ranges":true,"flip":true,"times":2}"#));
    for status in [200, 200, 206] {
        assert_eq!(ranged(&large).await.expect("an answer").status(), status);
    }
}

#[tokio::test]
async fn every_byte_of_a_body_is_counted_and_no_other() {
    let registry = registry(Link::default()).await;
    let path = registry.push_blob(&noise(300_000)).await;
    registry.push_manifest("one", &manifest("one", None)).await.expect("pushed");
    let reset = registry.ask(reqwest::Method::POST, "/_sluice/reset").await;
    assert_eq!(reset.status(), 204);
    let (mut all, mut blobs) = (0, 0);
    let missing = format!("/v2/a/b/blobs/{}", digest(b"missing"));
    for path in ["/v2/", "/v2/a/b/tags/list", "/v2/a/b/manifests/one", "/v2/a/b/manifests/none", &missing] {
        let len = registry.get(path).await.bytes().await.expect("a body").len() as u64;
        all += len;
        blobs += if path.contains("/blobs/") { len } else { 0 };
    }
    assert_eq!(registry.ask(reqwest::Method::HEAD, &path).await.status(), 200);
    let ranged = registry.http.get(registry.url(&path)).header(RANGE, "bytes=5-70004").send().await;
    assert_eq!(ranged.expect("an answer").bytes().await.expect("a body").len(), 70_000);
    registry.server.set_faults(Faults { truncate_at: Some(150_000), ..Faults::default() });
    assert_eq!(body_len(&raw(&registry, &path, usize::MAX).await), 150_000);
    let stats = registry.server.stats();
    assert_eq!((stats.blob_bytes_sent, stats.bytes_sent), (blobs + 220_000, all + 220_000));
    assert_eq!(stats.requests, 8, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_not_counted_as_served() {
    let rate = Some(80_000_000);
    let registry = registry(Link { rate_bits_per_second: rate, round_trip: Duration::from_millis(10) }).await;
    let path = registry.push_blob(&noise(40 * MIB)).await;
    let before = registry.server.stats().blob_bytes_sent;
    let got = raw(&registry, &path, MIB).await.len() as u64;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let counted = registry.server.stats().blob_bytes_sent - before;
    eprintln!("a client took {got} bytes and left, {counted} were counted");
    // What waits in the connection: the buffers of the server, and what the link carried until it was seen.
    assert!(counted >= MIB as u64 && counted < got + 2 * MIB as u64, "{counted}");
}

const INSIDE: &str = "SLUICE_TEST_FEW_DESCRIPTORS";

/// The server runs in a process of its own, this test again, that may open few files.
#[tokio::test(flavor = "multi_thread")]
async fn out_of_descriptors() {
    if std::env::var_os(INSIDE).is_some() {
        let registry = registry(Link::default()).await;
        let line = format!("listening on {}\n", registry.server.address());
        std::io::Write::write_all(&mut std::io::stdout(), line.as_bytes()).expect("written");
        // Until the test closes it.
        tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new()))
            .await
            .expect("a thread")
            .ok();
        return;
    }
    let mut server = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 40; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "out_of_descriptors", "--nocapture"])
        .env(INSIDE, "1")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("a process");
    let said = std::io::BufReader::new(server.stdout.take().expect("its output"));
    let mut lines = std::io::BufRead::lines(said);
    let address =
        lines.find_map(|line| line.ok()?.split_once("listening on ").map(|(_, end)| end.to_owned()));
    let address = address.expect("an address");

    let mut sockets = Vec::new();
    for _ in 0..60 {
        sockets.push(TcpStream::connect(&address).await.expect("queued"));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = cpu_time(server.id());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let spent = cpu_time(server.id()) - before;
    eprintln!("processor time in 500 ms without descriptors: {spent:?}");
    drop(sockets);
    let answer = http().get(format!("http://{address}/v2/")).send().await;
    drop(server.stdin.take());
    assert!(server.wait().expect("ended").success());
    assert_eq!(answer.expect("it goes on").status(), 200);
    assert!(spent < Duration::from_millis(50), "{spent:?}");
}

/// Of a process, over all its threads.
fn cpu_time(process: u32) -> Duration {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{process}/task")).expect("its threads") {
        let text = std::fs::read_to_string(task.expect("a thread").path().join("schedstat")).expect("times");
        let first = text.split(' ').next().expect("a number");
        nanoseconds += first.parse::<u64>().expect("a number");
    }
    Duration::from_nanos(nanoseconds)
}
