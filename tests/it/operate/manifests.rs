//! What Kubernetes is given: every overlay renders, is what its schemas allow, and agrees with the program's own
//! configuration.

use std::{collections::BTreeMap, ffi::OsString, process::Command, time::Duration};

use k8s_openapi::api::{
    apps::v1::Deployment,
    autoscaling::v2::HorizontalPodAutoscaler,
    core::v1::{ConfigMap, Namespace, Secret, Service},
    networking::v1::{Ingress, NetworkPolicy},
    policy::v1::PodDisruptionBudget,
};
use kcr_monitoring_coreos_com::v1::{prometheusrules::PrometheusRule, servicemonitors::ServiceMonitor};
use seatlock::config::{self, Config, Invocation};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{items, path, text, word, yaml};
use crate::support::process::run;

const RULE: &str = "k8s/monitoring/prometheus-rule.yaml";
const OVERLAYS: [&str; 2] = ["dev", "production"];

/// What is left of the grace after `preStop` and drain for the end of the process, at least.
const MARGIN: Duration = Duration::from_secs(5);

/// The objects of an overlay, as `kubectl apply -k` would send them.
fn rendered(overlay: &str) -> Vec<Value> {
    built(&format!("k8s/overlays/{overlay}"))
}

/// The objects of a folder with a `kustomization.yaml`.
fn built(folder: &str) -> Vec<Value> {
    let ran = Command::new("kubectl").args(["kustomize", folder]).current_dir(path("")).output();
    let ran = ran.expect("kubectl is installed (tests/run installs it)");
    assert!(ran.status.success(), "{folder}: {}", String::from_utf8_lossy(&ran.stderr));
    let text = String::from_utf8(ran.stdout).expect("UTF-8");
    assert!(ran.stderr.is_empty(), "{folder}: {}", String::from_utf8_lossy(&ran.stderr));
    text.split("\n---\n").map(yaml).collect()
}

/// The one object of a kind.
fn one<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<_> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    found[0]
}

/// What an object's published type does not know of it, or wants and does not find. Types drop what they do not know, so
/// what comes out again is what is allowed.
fn refused<T: Serialize + DeserializeOwned>(object: &Value) -> Option<String> {
    let typed: T = match serde_json::from_value(object.clone()) {
        Ok(typed) => typed,
        Err(error) => return Some(error.to_string()),
    };
    let again = serde_json::to_value(&typed).expect("a type of Kubernetes is JSON");
    (again != *object).then(|| format!("is {object}\nand its type knows {again}"))
}

/// The complaint of an object's own schema, if there is one.
fn complaint(object: &Value) -> Option<String> {
    let complaint = match (word(&object["apiVersion"]), word(&object["kind"])) {
        ("v1", "Namespace") => refused::<Namespace>(object),
        ("v1", "ConfigMap") => refused::<ConfigMap>(object),
        ("v1", "Secret") => refused::<Secret>(object),
        ("v1", "Service") => refused::<Service>(object),
        ("apps/v1", "Deployment") => refused::<Deployment>(object),
        ("autoscaling/v2", "HorizontalPodAutoscaler") => refused::<HorizontalPodAutoscaler>(object),
        ("policy/v1", "PodDisruptionBudget") => refused::<PodDisruptionBudget>(object),
        ("networking.k8s.io/v1", "Ingress") => refused::<Ingress>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => refused::<NetworkPolicy>(object),
        ("monitoring.coreos.com/v1", "ServiceMonitor") => refused::<ServiceMonitor>(object),
        ("monitoring.coreos.com/v1", "PrometheusRule") => refused::<PrometheusRule>(object),
        (version, kind) => Some(format!("no schema of {kind} in {version} here")),
    };
    complaint.map(|why| format!("{} {}: {why}", word(&object["kind"]), object["metadata"]["name"]))
}

fn secret() -> Value {
    yaml(&text("k8s/overlays/production/secret.template.yaml"))
}

#[test]
fn every_overlay_is_what_the_schemas_allow() {
    for overlay in OVERLAYS {
        let objects = rendered(overlay);
        let complaints: Vec<String> = objects.iter().filter_map(complaint).collect();
        assert!(complaints.is_empty(), "{overlay}: {}", complaints.join("\n"));
        assert!(objects.len() >= 4, "{overlay} has its objects");
    }
    assert_eq!(complaint(&secret()), None);
}

#[test]
fn what_a_schema_does_not_allow_is_found() {
    let objects = rendered("production");
    let broken = |kind: &str, pointer: &str, value: Value| {
        let mut object = one(&objects, kind).clone();
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        object.pointer_mut(parent).expect("an object")[field] = value;
        complaint(&object)
    };
    let container = "/spec/template/spec/containers/0";
    for (kind, pointer, value) in [
        ("Deployment", "/spec/template/spec/terminationGracePeriod".to_owned(), json!(40)),
        ("Deployment", format!("{container}/readinessProbe/httpGet/port"), json!(["admin"])),
        ("Deployment", format!("{container}/resources/requests"), json!("1Gi")),
        ("Deployment", format!("{container}/lifecycle/preStop"), json!({ "sleep": 5 })),
        ("HorizontalPodAutoscaler", "/spec/maxReplicas".to_owned(), json!("many")),
        ("NetworkPolicy", "/spec/egres".to_owned(), json!([])),
        ("ServiceMonitor", "/spec/endpoint".to_owned(), json!([])),
        ("PrometheusRule", "/spec/groups".to_owned(), json!([{ "rules": [] }])),
    ] {
        assert!(broken(kind, &pointer, value).is_some(), "{kind} {pointer}");
    }
}

/// The variables that the container of an overlay starts with.
fn environment(objects: &[Value], secret: Option<&Value>) -> BTreeMap<String, String> {
    let map = one(objects, "ConfigMap");
    let container = &one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    for from in items(&container["envFrom"]) {
        let data = if from["configMapRef"]["name"] == map["metadata"]["name"] {
            &map["data"]
        } else {
            let secret = secret.unwrap_or_else(|| panic!("{from} is not in the overlay"));
            assert_eq!(from["secretRef"]["name"], secret["metadata"]["name"]);
            &secret["stringData"]
        };
        let data = data.as_object().expect("an object").iter();
        env.extend(data.map(|(name, value)| (name.clone(), word(value).to_owned())));
    }
    env
}

fn configurations() -> Vec<(&'static str, Vec<Value>, Config)> {
    let mut secret = secret();
    secret["stringData"]["SEATLOCK_JWT_SECRET"] = json!("a-key-of-32-bytes-for-tests-only");
    let each = OVERLAYS.into_iter().map(|overlay| {
        let objects = rendered(overlay);
        let env = environment(&objects, (overlay == "production").then_some(&secret));
        let env = env.into_iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let config = match config::parse([OsString::from("seatlock")], env) {
            Ok(Invocation::Run(config)) => *config,
            other => panic!("{overlay}: {other:?}"),
        };
        assert!(config.warnings.is_empty(), "{overlay}: {:?}", config.warnings);
        (overlay, objects, config)
    });
    each.collect()
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs(value.as_u64().unwrap_or_else(|| panic!("{value} is no number of seconds")))
}

/// The program reads what each overlay gives it, listens where the pod says, and has the time for its drain.
#[test]
fn the_program_can_live_with_every_overlay() {
    for (overlay, objects, config) in configurations() {
        let pod = &one(&objects, "Deployment")["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let port = |name: &str| {
            let found = items(&container["ports"]).iter().find(|port| port["name"] == name);
            u16::try_from(found.expect("a named port")["containerPort"].as_u64().expect("a number")).expect("a port")
        };
        let admin = config.admin_listen.expect("probes and metrics are not public");
        assert_eq!((config.listen.port(), admin.port()), (port("http"), port("admin")), "{overlay}");
        assert!(config.listen.ip().is_unspecified() && admin.ip().is_unspecified(), "{overlay}: reachable");
        for (probe, page) in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
            assert_eq!(container[probe]["httpGet"], json!({ "path": page, "port": "admin" }), "{overlay}: {probe}");
        }
        let before = seconds(&container["lifecycle"]["preStop"]["sleep"]["seconds"]);
        let grace = seconds(&pod["terminationGracePeriodSeconds"]);
        assert!(before + config.drain_timeout + MARGIN < grace, "{overlay}: {before:?} and the drain within {grace:?}");
        assert_eq!(config.demo, overlay == "dev", "{overlay}");
        let replicas = one(&objects, "Deployment")["spec"]["replicas"].as_u64();
        assert!(config.redis_url.is_some() || replicas == Some(1), "{overlay}: one replica without Redis");
        let image = word(&container["image"]);
        assert!(image.ends_with(concat!("/seatlock:", env!("CARGO_PKG_VERSION"))) || !image.contains('/'), "{image}");
        assert!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{overlay}: {image}");
        // Admitted where pod security is "restricted".
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{overlay}");
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{overlay}");
        let may = &container["securityContext"];
        let due = json!({ "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] } });
        assert_eq!(may, &due, "{overlay}");
    }
}

/// As it stands the template starts nothing, and says why.
#[test]
fn the_template_of_the_secret_is_refused() {
    let mut env = environment(&rendered("production"), Some(&secret()));
    for name in ["SEATLOCK_LISTEN", "SEATLOCK_ADMIN_LISTEN"] {
        assert!(env.insert(name.to_owned(), "127.0.0.1:0".to_owned()).is_some());
    }
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let ended = run(&[], &env);
    assert_eq!(ended.code, 64, "{}", ended.err);
    assert!(ended.err.contains("no token key: give SEATLOCK_JWT_SECRET"), "{}", ended.err);
}

/// Everything that selects pods or names ports means ours.
#[test]
fn the_objects_mean_each_other() {
    let (_, objects, config) = configurations().pop().expect("production is the last");
    let pod = &one(&objects, "Deployment")["spec"]["template"];
    let labels = json!({ "app.kubernetes.io/name": "seatlock" });
    assert_eq!(pod["metadata"]["labels"], labels);
    for (kind, pointer) in [
        ("Deployment", "/spec/selector/matchLabels"),
        ("Service", "/spec/selector"),
        ("PodDisruptionBudget", "/spec/selector/matchLabels"),
        ("NetworkPolicy", "/spec/podSelector/matchLabels"),
        ("ServiceMonitor", "/spec/selector/matchLabels"),
        ("Deployment", "/spec/template/spec/topologySpreadConstraints/0/labelSelector/matchLabels"),
        ("Deployment", "/spec/template/spec/topologySpreadConstraints/1/labelSelector/matchLabels"),
    ] {
        assert_eq!(one(&objects, kind).pointer(pointer), Some(&labels), "{kind} {pointer}");
    }
    let scaled = &one(&objects, "HorizontalPodAutoscaler")["spec"];
    assert_eq!(scaled["scaleTargetRef"]["name"], one(&objects, "Deployment")["metadata"]["name"]);
    // What every cluster with a metrics server can answer: an unanswered metric keeps the fleet from getting smaller.
    assert!(items(&scaled["metrics"]).iter().all(|metric| metric["type"] == "Resource"), "{scaled}");

    let service = one(&objects, "Service");
    // Alerts go by this name of the job.
    let monitor = &one(&objects, "ServiceMonitor")["spec"];
    assert_eq!(service["metadata"]["labels"][word(&monitor["jobLabel"])], "seatlock");
    let named = |list: &Value, name: &Value| items(list).iter().any(|port| port["name"] == *name);
    let container = &pod["spec"]["containers"][0];
    for port in items(&service["spec"]["ports"]) {
        assert!(named(&container["ports"], &port["targetPort"]), "{port}");
    }
    let backend = &one(&objects, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"];
    assert_eq!(backend["name"], service["metadata"]["name"]);
    assert_eq!(backend["port"]["name"], "http", "never the admin port");
    assert!(named(&service["spec"]["ports"], &monitor["endpoints"][0]["port"]), "{monitor}");
    let policy = &one(&objects, "NetworkPolicy")["spec"];
    for from in items(&policy["ingress"]) {
        assert!(named(&container["ports"], &from["ports"][0]["port"]), "{from}");
    }
    let open: Vec<u64> = items(&policy["egress"])
        .iter()
        .flat_map(|to| items(&to["ports"]).iter().filter_map(|port| port["port"].as_u64()))
        .collect();
    for url in [config.redis_url, config.amqp_url, config.events_url].into_iter().flatten() {
        let port = url::Url::parse(url.reveal()).expect("a URL").port().expect("with a port");
        assert!(open.contains(&port.into()), "the way to {port} is open");
    }
    let operations = text("docs/operations.md");
    let collector = operations.split("OTEL_EXPORTER_OTLP_ENDPOINT=").nth(1).and_then(|rest| rest.split(' ').next());
    let collector = url::Url::parse(collector.expect("an example")).expect("a URL").port().expect("with a port");
    assert!(open.contains(&collector.into()), "the way to the collector of docs/operations.md is open");
    let grants: Vec<_> = objects.iter().filter(|object| object["metadata"]["namespace"] != "seatlock").collect();
    assert!(grants.iter().all(|object| object["kind"] == "Namespace"), "{grants:?}");
}

/// With the component the fleet is scaled by a gauge that is exported, beside what it went by before.
#[test]
fn the_component_scales_by_sockets_too() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Kustomize takes folders by relative paths only.
    let deep = folder.path().canonicalize().expect("it is there").components().count() - 1;
    let root = format!("{}{}", "../".repeat(deep), path("").canonicalize().expect("it is there").display());
    let with = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [format!("{root}/k8s/overlays/production")],
        "components": [format!("{root}/k8s/sockets-metric")],
    });
    // JSON is YAML.
    std::fs::write(folder.path().join("kustomization.yaml"), with.to_string()).expect("our folder");
    let objects = built(&folder.path().display().to_string());
    let before = rendered("production");
    let metrics = |objects: &[Value]| items(&one(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]).to_vec();
    let scaled = metrics(&objects);
    let (last, others) = scaled.split_last().expect("a metric");
    assert_eq!(others, metrics(&before));
    let gauge = word(&last["pods"]["metric"]["name"]);
    assert!(seatlock::metrics::ALL.iter().any(|metric| metric.name == gauge), "{gauge} is exported");
    assert_eq!(complaint(one(&objects, "HorizontalPodAutoscaler")), None);
}

/// The operator's rules are the ones that are tested.
#[test]
fn the_rules_of_the_operator_are_the_tested_ones() {
    let mut due = String::from(
        "# Made from deploy/prometheus/alerts.yaml; change that. A test compares them, and\n\
         # UPDATE_DOCS=1 cargo nextest run --test it operate::manifests writes this anew.\n\
         apiVersion: monitoring.coreos.com/v1\n\
         kind: PrometheusRule\n\
         metadata:\n  \
           name: seatlock\n  \
           labels: { app.kubernetes.io/name: seatlock }\n\
         spec:\n",
    );
    for line in text("deploy/prometheus/alerts.yaml").lines() {
        due.push_str(if line.is_empty() { "" } else { "  " });
        due.push_str(line);
        due.push('\n');
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path(RULE), &due).expect("the file can be written");
    }
    assert_eq!(text(RULE), due, "{RULE} is old: UPDATE_DOCS=1 cargo nextest run --test it operate::manifests");
    let objects = rendered("production");
    let alerts = yaml(&text("deploy/prometheus/alerts.yaml"));
    assert_eq!(one(&objects, "PrometheusRule")["spec"], alerts);
}
