//! Who may ask for what: every RPC and every HTTP route of every role stands in one table with its rule. What has no
//! row is refused.

use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use moesaic_proto::v1::Role;
use tonic::Status;
use tonic::service::Routes;

use crate::identity::{Identity, role_name};

/// Who is on the other end of a connection: the certificate that it has shown, if any.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    pub identity: Option<Identity>,
}

/// What a key is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// To use the model.
    Infer,
    /// To see how the cluster runs.
    Watch,
    /// To see and to change it.
    Operate,
}

impl Scope {
    /// Whether who has this one may do what `needed` is for.
    pub fn covers(self, needed: Self) -> bool {
        self == needed || (self, needed) == (Self::Operate, Self::Watch)
    }
}

/// Who may: who has a certificate of one of the roles, or a key with the scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub roles: &'static [Role],
    pub key: Option<Scope>,
    /// Anybody, without either: nothing there tells of the cluster or its users.
    pub is_open: bool,
}

const NODES: &[Role] = &[Role::Coordinator, Role::AttentionWorker, Role::ExpertWorker, Role::Operator];

const fn roles(roles: &'static [Role]) -> Rule {
    Rule { roles, key: None, is_open: false }
}

const fn key(scope: Scope, roles: &'static [Role]) -> Rule {
    Rule { roles, key: Some(scope), is_open: false }
}

const OPEN: Rule = Rule { roles: NODES, key: None, is_open: true };
const INFER: Rule = key(Scope::Infer, &[Role::Operator]);
const WATCH: Rule = key(Scope::Watch, &[Role::Operator]);
const OPERATE: Rule = key(Scope::Operate, &[Role::Operator]);

/// gRPC methods by their path, HTTP routes as "METHOD /path" (a last segment {*} stands for the rest).
pub const TABLE: &[(&str, Rule)] = &[
    // The public API.
    ("/moesaic.v1.Inference/Generate", INFER),
    ("/moesaic.v1.Inference/Abort", INFER),
    ("/moesaic.v1.Inference/ListModels", INFER),
    ("/moesaic.v1.Inference/Tokenize", INFER),
    ("POST /v1/chat/completions", INFER),
    ("POST /v1/completions", INFER),
    ("GET /v1/models", INFER),
    ("GET /v1/models/{*id}", INFER),
    ("POST /tokenize", INFER),
    ("POST /detokenize", INFER),
    // Load balancers ask without a key; whoever has none is not told why.
    ("GET /health", OPEN),
    // The dashboard. Its files tell of no cluster; what they read does.
    ("GET /", OPEN),
    ("GET /dashboard/{file}", OPEN),
    ("GET /dashboard/events", WATCH),
    ("POST /dashboard/actions/cordon", OPERATE),
    ("POST /dashboard/actions/rebalance", OPERATE),
    // Operators. What only the leader can do, other coordinators pass on to it.
    ("/moesaic.v1.Admin/Status", WATCH),
    ("/moesaic.v1.Admin/Cordon", OPERATE),
    ("/moesaic.v1.Admin/Rebalance", key(Scope::Operate, &[Role::Operator, Role::Coordinator])),
    // Between nodes.
    ("/moesaic.v1.AttentionWorker/Run", roles(&[Role::Coordinator])),
    ("/moesaic.v1.AttentionWorker/Abort", roles(&[Role::Coordinator])),
    ("/moesaic.v1.AttentionWorker/Load", roles(&[Role::Coordinator, Role::Operator])),
    ("/moesaic.v1.AttentionWorker/ExpertLoad", roles(&[Role::Coordinator])),
    ("/moesaic.v1.Experts/Exchange", roles(&[Role::AttentionWorker])),
    // Every server's.
    ("/grpc.health.v1.Health/Check", OPEN),
    ("/grpc.health.v1.Health/Watch", OPEN),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", key(Scope::Infer, &[Role::Operator])),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", key(Scope::Infer, &[Role::Operator])),
];

/// The rule of a row. None: nobody may.
pub fn rule(row: &str) -> Option<&'static Rule> {
    TABLE.iter().find(|(of, _)| *of == row).map(|(_, rule)| rule)
}

/// Why a certificate is not enough. The words are made only where they are said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("{row} has no rule: nobody may use it")]
    NoRule { row: String },
    #[error("this needs {}", _0.needed())]
    Unknown(&'static Rule),
    #[error("{identity} may not use this: it needs {}", rule.needed())]
    Role { identity: Identity, rule: &'static Rule },
}

impl Rule {
    /// In words, for who was refused.
    pub fn needed(&self) -> String {
        let mut ways: Vec<String> =
            self.roles.iter().map(|role| format!("a certificate of the role {}", role_name(*role))).collect();
        match self.key {
            Some(Scope::Infer) => ways.push("an API key".into()),
            Some(Scope::Watch) => ways.push("an API key with the scope watch or operate".into()),
            Some(Scope::Operate) => ways.push("an API key with the scope operate".into()),
            None => {}
        }
        ways.join(" or ")
    }
}

/// Whether what a row is about is open to this caller, by its certificate or because it is open to all.
pub fn check(row: &str, caller: Option<&Caller>) -> Result<(), Denied> {
    let rule = rule(row).ok_or_else(|| Denied::NoRule { row: row.chars().take(120).collect() })?;
    match caller.and_then(|caller| caller.identity.as_ref()) {
        _ if rule.is_open => Ok(()),
        Some(identity) if rule.roles.contains(&identity.role) => Ok(()),
        Some(identity) => Err(Denied::Role { identity: identity.clone(), rule }),
        None => Err(Denied::Unknown(rule)),
    }
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Unknown(_) => Status::unauthenticated(denied.to_string()),
            Denied::NoRule { .. } | Denied::Role { .. } => Status::permission_denied(denied.to_string()),
        }
    }
}

/// Puts the table in front of a worker's RPCs.
pub fn guarded(routes: Routes) -> Routes {
    async fn guard(request: Request, next: Next) -> Response {
        match check(request.uri().path(), request.extensions().get()) {
            Ok(()) => next.run(request).await,
            Err(denied) => {
                tracing::warn!(path = request.uri().path(), %denied, "a call was refused");
                Status::from(denied).into_http::<Body>()
            }
        }
    }
    routes.prepare().into_axum_router().layer(axum::middleware::from_fn(guard)).into()
}
