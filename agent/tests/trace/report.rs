//! The page of a start in a real browser: what it shows, by mouse, keyboard and screen reader, in light and dark, without a network.

use serde_json::{Value, json};

use crate::browser::Browser;
use crate::commands::record;
use crate::otlp::python;
use crate::rig::Node;

/// Two starts: one that had to ask for everything, one with a start pack.
fn two_starts(node: &Node) -> (String, String) {
    let first = record(node);
    let kept = node.path("first.trace");
    std::fs::copy(node.path("root/traces").join(format!("{first}.trace")), &kept).unwrap();
    node.ok(&["profile", "push", "--pack", &node.image()]);
    node.become_another();
    let second = record(node);
    (kept.to_str().unwrap().to_owned(), second)
}

fn open(node: &Node, name: &str) -> Browser {
    let mut browser = Browser::open(&format!("file://{}", node.path(name).display()), (1280, 800));
    browser.wait_for("document.documentElement.dataset.drawn === 'yes'");
    browser
}

#[test]
fn a_person_can_look_at_a_start() {
    let node = Node::indexed("[stream]\nfill = false\n");
    let (first, second) = two_starts(&node);
    let page = node.path("start.html");
    node.ok(&["trace", "report", &first, "-o", page.to_str().unwrap()]);
    let mut browser = open(&node, "start.html");
    let sections = browser.value("[...document.querySelectorAll('section')].map((one) => one.id)");
    assert_eq!(sections, json!(["numbers", "waterfall", "files", "ahead", "bandwidth", "layers"]));
    let files =
        "[...document.querySelectorAll('#files tbody td')].some((one) => one.textContent === '/data/large')";
    assert_eq!(browser.value(files), json!(true));
    assert!(browser.value("document.querySelectorAll('#layers .c1').length").as_u64().unwrap() > 0);
    assert!(browser.value("document.querySelectorAll('#bandwidth rect').length").as_u64().unwrap() > 0);

    // The keyboard: the bars are one stop, arrows go from bar to bar, and what has the focus is said.
    let focus = "document.activeElement.getAttribute('class') === 'bar'";
    for _ in 0..20 {
        browser.key("Tab");
        if browser.value(focus) == Value::Bool(true) {
            break;
        }
    }
    assert_eq!(browser.value(focus), Value::Bool(true), "no bar can be reached");
    let said = "document.getElementById('detail').textContent";
    let before = browser.text(said);
    assert!(before.contains("ms"), "{before}");
    browser.key("ArrowRight");
    assert_ne!(browser.text(said), before);
    browser.key("End");
    assert_eq!(browser.text(said), browser_text_of_last_bar(&mut browser));
    browser.key("Home");
    assert_eq!(browser.text(said), before);

    // The mouse.
    let place = browser.value("(() => { const box = document.querySelector('#waterfall .bar').getBoundingClientRect(); return [box.x + 1, box.y + 3]; })()");
    browser.call("Input.dispatchMouseEvent", &json!({ "type": "mouseMoved", "x": place[0], "y": place[1] }));
    browser.wait_for(&format!(
        "{said} === document.querySelector('#waterfall .bar').getAttribute('aria-label')"
    ));

    // Light and dark: each has its own colours, and text that can be read.
    for dark in [false, true] {
        let theme = browser.text("document.documentElement.dataset.theme");
        assert_eq!(theme, if dark { "dark" } else { "light" });
        let contrast = browser.value(CONTRAST).as_f64().unwrap();
        assert!(contrast >= 4.5, "{theme}: contrast {contrast}");
        assert_eq!(barriers(&mut browser), json!([]), "{theme}");
        browser.screenshot(&format!("start-{theme}"));
        browser.value("document.getElementById('theme').click()");
    }

    // The screen reader.
    let tree = browser.tree();
    let has = |role: &str, part: &str| tree.iter().any(|(one, name)| one == role && name.contains(part));
    for (role, part) in [
        ("heading", "Waterfall"),
        ("image", "Bandwidth of start"),
        ("image", "touched"),
        ("region", "Files that were waited for"),
        ("columnheader", "waited"),
        ("link", "Skip to the start"),
        ("button", "Dark"),
    ] {
        assert!(has(role, part), "{role} {part} is not said: {tree:?}");
    }
    // A narrow window has no second scroll bar.
    browser.window(380, 800);
    assert_eq!(browser.value("document.documentElement.scrollWidth <= 380"), Value::Bool(true));
    assert_eq!(browser.complaints(), Vec::<String>::new());
    assert!(browser.requests().iter().all(|address| address.starts_with("file://")), "the network was asked");

    node.ok(&["trace", "report", &first, "--compare", &second, "-o", page.to_str().unwrap()]);
    let mut browser = open(&node, "start.html");
    assert_eq!(browser.value("document.querySelectorAll('#waterfall svg').length"), json!(2));
    let said = browser.text("document.querySelector('#numbers').textContent");
    assert!(said.contains("% of A's"), "{said}");
    assert!(
        browser.value("document.querySelectorAll('#layers .c2').length").as_u64().unwrap() > 0,
        "no hits"
    );
    assert_eq!(barriers(&mut browser), json!([]), "two starts");
    browser.screenshot("two-starts");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// What axe-core finds in a page that keeps somebody out, all its rules applied.
fn barriers(browser: &mut Browser) -> Value {
    let script = "import os, axe_core_python; print(open(os.path.join(os.path.dirname(axe_core_python.__file__), 'axe.min.js')).read())";
    let axe = python().args(["-c", script]).output().expect("python starts");
    let axe = String::from_utf8(axe.stdout).expect("a script");
    assert!(axe.contains("axe"), "axe-core is missing: `cargo xtask test` installs it");
    browser.value(&format!("{axe}; 0"));
    browser.value(
        "axe.run(document).then((found) => found.violations.map((one) => one.id + ': ' + one.nodes.map((node) => node.html).join(' ')))",
    )
}

fn browser_text_of_last_bar(browser: &mut Browser) -> String {
    browser.text("[...document.querySelectorAll('#waterfall .bar')].pop().getAttribute('aria-label')")
}

/// The least contrast of text and its ground, as WCAG has it.
const CONTRAST: &str = "(() => {
  const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((one) => { const c = one / 255; return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  return Math.min(...[...document.querySelectorAll('h1, h2, p, dt, dd, td, th')].map((node) => { const own = light(getComputedStyle(node).color); return (Math.max(own, ground) + .05) / (Math.min(own, ground) + .05); }));
})()";
