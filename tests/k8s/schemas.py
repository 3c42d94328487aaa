"""Schemas of the custom resources that are used, as far as they are used: kubernetes-validate has Kubernetes' own alone."""


def closed(required: dict, optional: dict | None = None) -> dict:
    """An object with these fields and no others."""
    fields = required | (optional or {})
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^(\d+h)?(\d+m)?(\d+s)?$", "minLength": 2}
METADATA = closed({"name": TEXT, "namespace": TEXT}, {"labels": LABELS})


def resource(spec: dict) -> dict:
    return closed({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": spec})


ISSUER = resource(
    {
        "oneOf": [
            closed({"selfSigned": closed({})}),
            closed({"ca": closed({"secretName": TEXT})}),
        ]
    }
)
CERTIFICATE = resource(
    closed(
        {
            "secretName": TEXT,
            "issuerRef": closed({"name": TEXT}, {"kind": {"enum": ["Issuer", "ClusterIssuer"]}, "group": TEXT}),
        },
        {
            "isCA": {"type": "boolean"},
            "commonName": {"type": "string", "maxLength": 64},
            "uris": TEXTS,
            "dnsNames": TEXTS,
            "duration": DURATION,
            "renewBefore": DURATION,
            "usages": {
                "type": "array",
                "items": {"enum": ["cert sign", "crl sign", "digital signature", "server auth", "client auth"]},
            },
            "privateKey": closed(
                {
                    "algorithm": {"const": "ECDSA"},
                    "size": {"enum": [256, 384, 521]},
                    "rotationPolicy": {"enum": ["Always", "Never"]},
                }
            ),
        },
    )
)
POD_MONITOR = resource(
    closed(
        {
            "selector": closed({"matchLabels": LABELS}),
            "podMetricsEndpoints": {
                "type": "array",
                "minItems": 1,
                "items": closed(
                    {"port": TEXT},
                    {
                        "path": TEXT,
                        "interval": DURATION,
                        "relabelings": {
                            "type": "array",
                            "items": closed({"sourceLabels": TEXTS, "targetLabel": TEXT}),
                        },
                    },
                ),
            },
        }
    )
)

CUSTOM = {
    ("cert-manager.io/v1", "Issuer"): ISSUER,
    ("cert-manager.io/v1", "Certificate"): CERTIFICATE,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
}
