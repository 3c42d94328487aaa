//! `moesaic up`, in one process and in many, from start to exit code; and `moesaic chat` with it.

use std::time::{Duration, Instant};

use crate::process::{PATIENCE, Running, command_line, finish, moesaic, signal};

const QUESTION: &str = "What is 347 + 586?";

/// Asks over HTTP.
fn ask(url: &str) -> serde_json::Value {
    let body = serde_json::json!({"temperature": 0, "messages": [{"role": "user", "content": QUESTION}]});
    let answer = async {
        let client = reqwest::Client::new();
        let answer = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json().await.unwrap()
    };
    tokio::runtime::Runtime::new().unwrap().block_on(answer)
}

fn answers(url: &str) {
    let answer = ask(url);
    let message = &answer["choices"][0]["message"];
    assert!(message["content"].as_str().unwrap().contains("933"), "{answer}");
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty(), "{answer}");

    let (code, said, errors) = finish(moesaic().args(["chat", "--server", url, QUESTION]));
    assert_eq!(code, Some(0), "{errors}");
    assert!(said.contains("933") && said.contains("</think>"), "{said:?}");
}

fn stops_well(up: &mut Running) {
    let asked = Instant::now();
    up.signal("TERM");
    assert_eq!(up.wait().code(), Some(0), "{}", up.errors());
    assert!(asked.elapsed() < Duration::from_secs(5), "took {:?} to stop", asked.elapsed());
}

#[test]
fn one_process_serves_and_stops() {
    let mut up = Running::start(&["up", "--listen", "127.0.0.1:0", "--cache-tokens", "4096"]);
    let url = up.url();
    for part in ["tiny-r1 (deepseek_v3)", "bf16", "e0 holds 0 to 15, e1 holds 16 to 31", "4096 tokens", "curl"] {
        assert!(up.seen().contains(part), "{part:?} is not in\n{}", up.seen());
    }
    let ready = up.seen().lines().find_map(|line| line.strip_prefix("ready     after ")).unwrap();
    let seconds: f64 = ready.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds < 2.0, "{ready}");
    answers(&url);
    stops_well(&mut up);
}

#[test]
fn processes_serve_stop_in_order_and_leave_nothing() {
    let mut up = Running::start(&["up", "--processes", "--listen", "127.0.0.1:0", "--threads", "1"]);
    let url = up.url();
    let children = up.children();
    for role in ["etcd", "expert-worker --id=e0", "--id=e1", "attention-worker", "coordinator"] {
        assert!(children.iter().any(|(_, line)| line.contains(role)), "no {role} in {children:?}");
    }
    answers(&url);
    stops_well(&mut up);
    assert!(children.iter().all(|(id, _)| command_line(*id).is_empty()), "children outlived their parent");
}

#[test]
fn children_end_when_their_parent_is_killed() {
    let mut up = Running::start(&["up", "--processes", "--listen", "127.0.0.1:0", "--threads", "1"]);
    up.url();
    let children = up.children();
    assert_eq!(children.len(), 5, "{children:?}");
    up.signal("KILL");
    up.wait();
    let deadline = Instant::now() + PATIENCE;
    while children.iter().any(|(id, line)| command_line(*id) == *line) {
        assert!(Instant::now() < deadline, "still there: {children:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_child_that_dies_is_named() {
    let mut up = Running::start(&["up", "--processes", "--listen", "127.0.0.1:0", "--threads", "1"]);
    up.url();
    let (coordinator, _) = up.children().into_iter().find(|(_, line)| line.contains("--id=c0")).unwrap();
    signal(coordinator, "KILL");
    assert_eq!(up.wait().code(), Some(1));
    let errors = up.errors();
    assert!(errors.contains("coordinator c0 failed: signal: 9"), "{errors:?}");
}

/// With two copies of every expert and two attention workers any worker may be killed: answers go on, and it comes back.
#[test]
fn workers_that_die_are_started_again_and_nothing_is_lost_meanwhile() {
    let cluster = ["--attention-workers", "2", "--expert-workers", "2", "--replicas", "2", "--threads", "1"];
    let mut up = Running::start(&[&["up", "--processes", "--listen", "127.0.0.1:0"], &cluster[..]].concat());
    let url = up.url();
    let find = |up: &Running, id: &str| up.children().into_iter().find(|(_, line)| line.contains(id));
    let answer = ask(&url)["choices"].clone();
    for id in ["--id=e0", "--id=a1", "--id=e1"] {
        let (worker, _) = find(&up, id).unwrap();
        signal(worker, "KILL");
        assert_eq!(ask(&url)["choices"], answer, "right after {id} was killed");
        let deadline = Instant::now() + PATIENCE;
        while find(&up, id).is_none_or(|(again, _)| again == worker) {
            assert!(Instant::now() < deadline, "{id} does not come back");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Every expert has two live holders again, and each worker reaches all of them.
        while !healthy(&url) {
            assert!(Instant::now() < deadline, "{id} is back and does not work");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    stops_well(&mut up);
}

/// Whether `moesaic status` shows nothing that is missing.
fn healthy(url: &str) -> bool {
    let (code, said, _) = finish(moesaic().args(["status", "--edges", "--server", url]));
    let whole = said.contains("0 have no live holder, 0 have fewer than they should");
    code == Some(0) && whole && said.matches(": live").count() == 4 && said.matches(": ready").count() == 2
}

/// Packed experts change no answer; a packed file that does not fit stops the start with its name and the fix.
#[test]
fn packed_experts_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-r1");
    for entry in std::fs::read_dir(demo).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let model = dir.path().to_str().unwrap();
    let serve = || {
        let mut up = Running::start(&["up", "--listen", "127.0.0.1:0", "--cache-tokens", "4096", "--model", model]);
        let message = ask(&up.url())["choices"][0]["message"].clone();
        stops_well(&mut up);
        message
    };
    let before = serve();
    let (code, said, errors) = finish(moesaic().args(["pack", model]));
    assert_eq!(code, Some(0), "{errors}");
    let packed = said.split(": ").next().unwrap();
    assert!(said.contains("128 experts") && std::fs::metadata(packed).unwrap().len() > 4096, "{said}");
    assert_eq!(serve(), before);

    std::fs::write(packed, b"short").unwrap();
    let (code, _, errors) = finish(moesaic().args(["up", "--listen", "127.0.0.1:0", "--model", model]));
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains(packed) && errors.contains("moesaic pack"), "{errors}");
}
