//! A real browser without a window, driven over Chromium's own protocol: messages of JSON through two pipes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a page may take; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module text. Dropped, it ends, and what it wrote goes.
pub(crate) struct Browser {
    process: Child,
    dir: PathBuf,
    to: File,
    from: BufReader<File>,
    session: String,
    next: u64,
    complaints: Vec<String>,
    requests: Vec<String>,
}

/// A port of this machine that nobody listens on.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Where screenshots go, to be looked at.
fn screenshots() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("screenshots")
}

impl Browser {
    /// Opens a page in a window of this size.
    pub(crate) fn open(address: &str, (width, height): (u32, u32)) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("browser-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (to, from) = (dir.join("to"), dir.join("from"));
        for pipe in [&to, &from] {
            assert!(Command::new("mkfifo").arg(pipe).status().unwrap().success());
        }
        // The browser reads its descriptor 3 and writes to its descriptor 4.
        let script = "exec chromium-headless-shell --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --user-data-dir=\"$1/profile\" 3<\"$1/to\" 4>\"$1/from\"";
        let process = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromium-headless-shell is installed");
        let to = File::options().write(true).open(&to).unwrap();
        let from = BufReader::new(File::open(&from).unwrap());
        let session = String::new();
        let mut browser =
            Self { process, dir, to, from, session, next: 0, complaints: Vec::new(), requests: Vec::new() };
        let target = browser.call("Target.createTarget", &json!({ "url": "about:blank" }));
        let attached = json!({ "targetId": target["targetId"], "flatten": true });
        browser.session =
            browser.call("Target.attachToTarget", &attached)["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network", "Accessibility"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser.window(width, height);
        browser.call("Page.navigate", &json!({ "url": address }));
        browser
            .wait_for(&format!("location.href === {} && document.readyState === 'complete'", json!(address)));
        browser
    }

    /// Gives the window another size.
    pub(crate) fn window(&mut self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// Calls a method; its result.
    pub(crate) fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.ask(method, parameters).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// The same, or what the browser said against it.
    fn ask(&mut self, method: &str, parameters: &Value) -> Result<Value, Value> {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.clone().into();
        }
        self.to.write_all(message.to_string().as_bytes()).unwrap();
        self.to.write_all(&[0]).unwrap();
        loop {
            let mut bytes = Vec::new();
            self.from.read_until(0, &mut bytes).unwrap();
            bytes.pop();
            let said: Value = serde_json::from_slice(&bytes).expect("the browser lives");
            if said["id"] == self.next {
                let refused = !said["error"].is_null();
                return if refused { Err(said["error"].clone()) } else { Ok(said["result"].clone()) };
            }
            self.heard(&said);
        }
    }

    fn heard(&mut self, event: &Value) {
        match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push(event["params"].to_string()),
            Some("Log.entryAdded") if event["params"]["entry"]["source"] != "network" => {
                self.complaints.push(event["params"]["entry"]["text"].to_string());
            }
            Some("Network.requestWillBeSent") => {
                self.requests.push(event["params"]["request"]["url"].as_str().unwrap_or_default().to_owned());
            }
            _ => {}
        }
    }

    /// The value of an expression in the page.
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        self.try_value(expression).unwrap_or_else(|error| panic!("{expression}: {error}"))
    }

    /// The same; an error if the page throws, or goes while it is asked.
    fn try_value(&mut self, expression: &str) -> Result<Value, Value> {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.ask("Runtime.evaluate", &asked)?;
        if answer["exceptionDetails"].is_null() {
            Ok(answer["result"]["value"].clone())
        } else {
            Err(answer["exceptionDetails"].clone())
        }
    }

    /// The same, as text.
    pub(crate) fn text(&mut self, expression: &str) -> String {
        self.value(expression).as_str().unwrap_or_else(|| panic!("{expression} is no text")).to_owned()
    }

    /// Waits until an expression is true. A page that is being replaced throws, or is gone before it answered: it is asked again.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, expression: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.try_value(expression);
            if said == Ok(Value::Bool(true)) {
                return;
            }
            assert!(Instant::now() < deadline, "waited in vain for {expression}: {said:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Presses and releases a key.
    pub(crate) fn key(&mut self, key: &str) {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "End" => 35,
            "Home" => 36,
            "ArrowLeft" => 37,
            _ => 39,
        };
        for kind in ["rawKeyDown", "keyUp"] {
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            self.call("Input.dispatchKeyEvent", &event);
        }
        if key == "Enter" {
            self.call("Input.dispatchKeyEvent", &json!({ "type": "char", "text": "\r" }));
        }
    }

    /// Keeps what the page looks like.
    pub(crate) fn screenshot(&mut self, name: &str) {
        let height = self.value("document.documentElement.scrollHeight").as_u64().unwrap();
        let width = self.value("document.documentElement.clientWidth").as_u64().unwrap();
        let clip = json!({ "x": 0, "y": 0, "width": width, "height": height, "scale": 1 });
        let asked = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let picture = self.call("Page.captureScreenshot", &asked);
        use base64::Engine;
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(picture["data"].as_str().unwrap()).unwrap();
        std::fs::create_dir_all(screenshots()).unwrap();
        std::fs::write(screenshots().join(name).with_extension("png"), bytes).unwrap();
    }

    /// Roles and names, as a screen reader is told.
    pub(crate) fn tree(&mut self) -> Vec<(String, String)> {
        let tree = self.call("Accessibility.getFullAXTree", &json!({}));
        let text = |node: &Value, of: &str| node[of]["value"].as_str().unwrap_or_default().to_owned();
        tree["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|node| (text(node, "role"), text(node, "name")))
            .collect()
    }

    /// What the page's script complained of.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        self.value("0");
        std::mem::take(&mut self.complaints)
    }

    /// Addresses that the page asked for.
    pub(crate) fn requests(&mut self) -> Vec<String> {
        self.value("0");
        std::mem::take(&mut self.requests)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        // Its own processes end when their pipes do; one may still write.
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir_all(&self.dir).is_err() && self.dir.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn waiting_outlives_pages_that_throw_and_pages_that_go() {
    let page = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("page-{}.html", std::process::id()));
    std::fs::write(&page, "<p>a page").unwrap();
    let mut browser = Browser::open(&format!("file://{}", page.display()), (400, 300));
    browser.value("window.asked = 0");
    browser.wait_for("(() => { if (window.asked++ < 3) throw new Error('not yet'); return true; })()");
    assert_eq!(browser.value("window.asked"), json!(4));
    // The page that is asked first goes without an answer. A window's name outlives its pages.
    browser.wait_for(
        "window.name === 'asked' || (window.name = 'asked', location.reload(), new Promise(() => {}))",
    );
    assert_eq!(browser.value("window.asked === undefined"), json!(true));
    std::fs::remove_file(page).unwrap();
}
