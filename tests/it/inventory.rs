//! Containers of a real Docker show up as services.

use std::time::Duration;

use hestner_tests::docker::Docker;
use hestner_tests::{World, is_root_or_skips, receiver, wait_for, wait_until};

#[test]
fn container_shows_up_as_a_service_with_its_health() {
    if !is_root_or_skips("container_shows_up_as_a_service_with_its_health") {
        return;
    }
    let world = World::new("inventory-docker");
    let docker = Docker::start(&world.at("docker"));
    docker.run("hestner-box", &[], &["/bin/sleep", "5000"]);
    let agent = world
        .agent()
        .setting("inventory", &format!("docker_socket = {:?}", docker.socket()))
        .setting("inventory", "interval = \"2s\"")
        .setting("inventory", "systemd = false")
        .started();
    let path = format!("/v1/servers/{}/services", agent.server_id);
    let container = || {
        let rows = receiver::rows(&world.receiver.get_json(&path));
        rows.into_iter()
            .find(|s| s["runtime"] == "docker" && s["name"].as_str().is_some_and(|n| n.contains("hestner-box")))
    };
    let service = wait_for("the container in the inventory", Duration::from_secs(30), container);
    assert_eq!(service["health"], "ok", "{service}");

    docker.docker(&["stop", "-t", "0", "hestner-box"]).ok();
    wait_until("the stopped container in the inventory", Duration::from_secs(30), || {
        container().is_some_and(|service| service["health"] == "stopped")
    });
}
