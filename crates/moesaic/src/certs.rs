//! `moesaic certs`: an authority of one's own and a certificate for each node, for development and small clusters. In
//! production an authority that renews them by itself (such as cert-manager) writes the same files.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use moesaic_node::Identity;
use moesaic_node::identity::role_name;
use moesaic_proto::WorkerId;
use moesaic_proto::v1::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams,
    SanType, SerialNumber,
};
use time::{Duration, OffsetDateTime};

use crate::cli::{BadArguments, say};

const NODES_MAX: usize = 1024;
const AUTHORITY_DAYS: i64 = 3650;
/// Clocks of machines differ.
const CLOCK_SKEW: Duration = Duration::hours(1);
/// The operator's id and etcd's name.
const OPERATOR: &str = "admin";
const ETCD: &str = "etcd";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to put them: DIR/ca.crt and ca.key, and DIR/ROLE/ID/ for each node, to be given as its --tls
    dir: PathBuf,
    /// The cluster that they are for
    #[arg(long, default_value = "moesaic")]
    cluster: String,
    /// c0, c1, ...
    #[arg(long, value_name = "N", default_value_t = 1)]
    coordinators: usize,
    /// a0, a1, ...
    #[arg(long, value_name = "N", default_value_t = 1)]
    attention_workers: usize,
    /// e0, e1, ...
    #[arg(long, value_name = "N", default_value_t = 2)]
    expert_workers: usize,
    /// A name or address by which clients reach coordinators and nodes reach etcd, besides localhost
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// How long they are good for
    #[arg(long, value_name = "N", default_value_t = 90)]
    days: u32,
}

pub fn run(args: &Args) -> Result<()> {
    check(args)?;
    fs::create_dir_all(&args.dir).with_context(|| format!("cannot make {}", args.dir.display()))?;
    let authority = Authority::open_or_make(&args.dir, &args.cluster)?;
    let validity = Validity::days(args.days.into());
    let roles = [
        (Role::Coordinator, "c", args.coordinators),
        (Role::AttentionWorker, "a", args.attention_workers),
        (Role::ExpertWorker, "e", args.expert_workers),
    ];
    let nodes = roles.into_iter().flat_map(|(role, letter, n)| (0..n).map(move |i| (role, format!("{letter}{i}"))));
    for (role, id) in nodes.chain([(Role::Operator, OPERATOR.into())]) {
        let identity = Identity { cluster: args.cluster.clone(), role, id: WorkerId::new(&id)? };
        // Clients know coordinators by their host's name; nodes know each other by the identity alone.
        let hosts = if role == Role::Coordinator { args.host.as_slice() } else { &[] };
        authority.leaf(Some(&identity), hosts, validity)?.write(&folder(&args.dir, role, &id))?;
    }
    authority.leaf(None, &args.host, validity)?.write(&etcd_folder(&args.dir))?;
    let (dir, days, cluster) = (args.dir.display(), args.days, &args.cluster);
    say(&format!(
        "certificates of cluster {cluster} in {dir}, good for {days} days; the same command renews them\n  \
         a node     --tls {dir}/ROLE/ID\n  \
         operators  --tls {dir}/operator/{OPERATOR}\n  \
         etcd       --cert-file {dir}/{ETCD}/tls.crt --key-file {dir}/{ETCD}/tls.key --trusted-ca-file {dir}/ca.crt \
         --client-cert-auth\n"
    ));
    Ok(())
}

fn check(args: &Args) -> Result<(), BadArguments> {
    if WorkerId::new(&args.cluster).is_err() {
        let given = &args.cluster;
        return Err(BadArguments(format!("--cluster is {given:?}; expected 1 to 63 characters of a-z, 0-9 and -")));
    }
    let counts = [
        ("--coordinators", args.coordinators),
        ("--attention-workers", args.attention_workers),
        ("--expert-workers", args.expert_workers),
    ];
    if let Some((flag, count)) = counts.into_iter().find(|(_, count)| *count > NODES_MAX) {
        return Err(BadArguments(format!("{flag} is {count}; expected at most {NODES_MAX}")));
    }
    match args.days {
        0 => Err(BadArguments("--days is 0; expected at least 1".into())),
        _ => Ok(()),
    }
}

/// Where a node's certificate is.
pub fn folder(dir: &Path, role: Role, id: &str) -> PathBuf {
    dir.join(role_name(role)).join(id)
}

pub fn operator_folder(dir: &Path) -> PathBuf {
    folder(dir, Role::Operator, OPERATOR)
}

pub fn etcd_folder(dir: &Path) -> PathBuf {
    dir.join(ETCD)
}

/// From when to when a certificate is good.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    pub from: OffsetDateTime,
    pub to: OffsetDateTime,
}

impl Validity {
    /// From now on.
    pub fn days(days: i64) -> Self {
        let now = OffsetDateTime::now_utc();
        Self { from: now - CLOCK_SKEW, to: now + Duration::days(days) }
    }
}

/// Signs a cluster's certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// In PEM.
    certificate: String,
}

/// A certificate with its key and its authority, all in PEM.
#[derive(Clone)]
pub struct Leaf {
    pub certificate: String,
    pub key: String,
    pub authority: String,
    pub serial: SerialNumber,
}

impl Authority {
    pub fn new(cluster: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let params = Self::params(cluster);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The one that is in the folder, or a new one.
    fn open_or_make(dir: &Path, cluster: &str) -> Result<Self> {
        let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        if !key.exists() {
            let authority = Self::new(cluster)?;
            write(&certificate, &authority.certificate)?;
            write(&key, &authority.issuer.key().serialize_pem())?;
            return Ok(authority);
        }
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let pair = KeyPair::from_pem(&read(&key)?).with_context(|| format!("{}: no key in PEM", key.display()))?;
        Ok(Self { issuer: Issuer::new(Self::params(cluster), pair), certificate: read(&certificate)? })
    }

    /// The same for the same cluster, so that certificates of an authority that was read again name it rightly.
    fn params(cluster: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = name(&format!("Moesaic {cluster} authority"));
        let validity = Validity::days(AUTHORITY_DAYS);
        (params.not_before, params.not_after) = (validity.from, validity.to);
        params
    }

    /// For a node, or (with no identity) for a server that is none, such as etcd. `hosts` are names and addresses; localhost
    /// is always among them.
    pub fn leaf(&self, identity: Option<&Identity>, hosts: &[String], validity: Validity) -> Result<Leaf> {
        let local = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let mut params = CertificateParams::new([&local[..], hosts].concat())?;
        if let Some(identity) = identity {
            params.subject_alt_names.push(SanType::URI(identity.to_string().try_into()?));
        }
        // etcd takes the common name for its user's.
        let common = identity.map_or_else(|| ETCD.to_owned(), |identity| role_name(identity.role).to_owned());
        params.distinguished_name = name(&common);
        let serial = SerialNumber::from_slice(&uuid::Uuid::new_v4().as_bytes()[..]);
        params.serial_number = Some(serial.clone());
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (validity.from, validity.to);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Leaf { certificate, key: key.serialize_pem(), authority: self.certificate.clone(), serial })
    }

    /// A list of certificates that are good no more, in PEM: `ca.crl` in the folders of those who are to know.
    pub fn revoked(&self, serials: &[SerialNumber]) -> Result<String> {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &SerialNumber| RevokedCertParams {
            serial_number: serial.clone(),
            revocation_time: now,
            reason_code: Some(RevocationReason::Unspecified),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now - CLOCK_SKEW,
            next_update: now + Duration::days(AUTHORITY_DAYS),
            crl_number: SerialNumber::from(now.unix_timestamp().unsigned_abs()),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }
}

impl Leaf {
    /// Under the names that `moesaic_node::tls` reads. The key first: who sees a new certificate has its key.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        write(&dir.join("tls.key"), &self.key)?;
        write(&dir.join("tls.crt"), &self.certificate)?;
        write(&dir.join("ca.crt"), &self.authority)
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

/// Replaces the file as a whole; nobody else may read it.
fn write(path: &Path, text: &str) -> Result<()> {
    let written = || {
        let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
        file.write_all(text.as_bytes())?;
        file.persist(path).map_err(|error| error.error)
    };
    written().map(drop).with_context(|| format!("cannot write {}", path.display()))
}
