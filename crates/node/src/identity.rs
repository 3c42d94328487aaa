//! Who a certificate speaks for: `spiffe://<cluster>/<role>/<id>`, as the one URI among its names.

use std::fmt;
use std::str::FromStr;

use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use rustls::pki_types::CertificateDer;

const SCHEME: &str = "spiffe://";
/// Of a name that an error repeats.
const SHOWN_CHARS_MAX: usize = 120;

/// A node or an operator of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The trust domain.
    pub cluster: String,
    pub role: Role,
    pub id: WorkerId,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    #[error(
        "{0:?} is not spiffe://<cluster>/<role>/<id> with a role of coordinator, attention-worker, expert-worker, operator"
    )]
    Name(String),
    #[error("the certificate has {0} URI names; expected one, spiffe://<cluster>/<role>/<id>")]
    Names(usize),
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
}

/// Roles, as they are called in identities and in the registry's keys.
const ROLES: [(Role, &str); 4] = [
    (Role::Coordinator, "coordinator"),
    (Role::AttentionWorker, "attention-worker"),
    (Role::ExpertWorker, "expert-worker"),
    (Role::Operator, "operator"),
];

/// "unspecified" for the role that nobody has.
pub fn role_name(role: Role) -> &'static str {
    ROLES.iter().find(|(of, _)| *of == role).map_or("unspecified", |(_, name)| name)
}

pub fn role_of_name(name: &str) -> Option<Role> {
    ROLES.iter().find(|(_, of)| *of == name).map(|(role, _)| *role)
}

impl Identity {
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, InvalidIdentity> {
        let parsed = webpki::EndEntityCert::try_from(certificate);
        let parsed = parsed.map_err(|error| InvalidIdentity::Certificate(error.to_string()))?;
        let names: Vec<&str> = parsed.valid_uri_names().collect();
        match names[..] {
            [name] => name.parse(),
            _ => Err(InvalidIdentity::Names(names.len())),
        }
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(name: &str) -> Result<Self, InvalidIdentity> {
        let parse = || {
            let mut parts = name.strip_prefix(SCHEME)?.split('/');
            let (cluster, role, id) = (parts.next()?, parts.next()?, parts.next()?);
            let cluster = WorkerId::new(cluster).ok()?.as_str().to_owned();
            let is_whole = parts.next().is_none();
            is_whole.then_some(Self { cluster, role: role_of_name(role)?, id: WorkerId::new(id).ok()? })
        };
        parse().ok_or_else(|| InvalidIdentity::Name(name.chars().take(SHOWN_CHARS_MAX).collect()))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, role_name(self.role), self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written() {
        for (role, name) in ROLES {
            let identity = Identity { cluster: "c-1".into(), role, id: WorkerId::new("e0").unwrap() };
            assert_eq!(identity.to_string(), format!("spiffe://c-1/{name}/e0"));
            assert_eq!(identity.to_string().parse(), Ok(identity));
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "",
            "spiffe://c/coordinator",
            "spiffe://c/coordinator/",
            "spiffe://c/coordinator/a/b",
            "spiffe://c/unspecified/a",
            "spiffe://C/coordinator/a",
            "spiffe:///coordinator/a",
            "https://c/coordinator/a",
            "spiffe://c/Coordinator/a",
        ] {
            assert_eq!(name.parse::<Identity>(), Err(InvalidIdentity::Name(name.to_owned())));
        }
    }
}
