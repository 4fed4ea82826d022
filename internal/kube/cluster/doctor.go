package cluster

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/doctor"
)

// expirySoon is when a certificate should have been renewed.
const expirySoon = 24 * time.Hour

// probeTime bounds one check that asks a daemon.
const probeTime = 10 * time.Second

// Diagnose checks what a cluster needs for Functions to start, and what this user needs to use it. A check that the user may not make is a
// warning. The error is that of an API server that does not answer at all.
func (c *Client) Diagnose(ctx context.Context) ([]doctor.Finding, error) {
	if err := c.answers(ctx); err != nil {
		return nil, err
	}
	findings := []doctor.Finding{{Check: "cluster.api", Status: doctor.OK, Found: fmt.Sprintf("context %s answers at %s", c.context, c.config.Host)}}
	for _, check := range []func(context.Context) []doctor.Finding{c.checkKinds, c.checkDaemons, c.checkCertificates, c.checkRights, c.checkGateway} {
		findings = append(findings, check(ctx)...)
	}
	return findings, nil
}

// answers asks the API server for its version, which everybody may.
func (c *Client) answers(ctx context.Context) error {
	resp, err := c.get(ctx, "version")
	if err != nil {
		return c.coded(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.coded(answered(resp, "ask for the version"))
	}
	return nil
}

// unable is the finding of a check that could not be made.
func unable(check string, err error) doctor.Finding {
	status := doctor.Problem
	if apierrors.IsForbidden(err) {
		status = doctor.Warning
	}
	return doctor.Finding{Check: check, Status: status, Found: err.Error(), Meaning: "this could not be looked at"}
}

func do(format string, args ...any) *doctor.Fix { return &doctor.Fix{Do: fmt.Sprintf(format, args...)} }

// kinds of Hearth's that have to be there.
var kinds = []string{"functions", "revisions", "runtimes", "warmpools"}

func (c *Client) checkKinds(ctx context.Context) []doctor.Finding {
	const check = "cluster.crds"
	var missing []string
	for _, kind := range kinds {
		name := kind + "." + crd.GroupVersion.Group
		var definition apiextensionsv1.CustomResourceDefinition
		err := c.api.Get(ctx, client.ObjectKey{Name: name}, &definition)
		switch {
		case apierrors.IsNotFound(err) || err == nil && !serves(&definition, crd.GroupVersion.Version):
			missing = append(missing, name)
		case err != nil:
			return []doctor.Finding{unable(check, err)}
		}
	}
	if len(missing) > 0 {
		return []doctor.Finding{{Check: check, Status: doctor.Problem, Found: fmt.Sprintf("%s of version %s: not there, or not served", strings.Join(missing, ", "), crd.GroupVersion.Version),
			Meaning: "functions cannot be deployed", Fix: do("bring them there with `hearth install`")}}
	}
	return []doctor.Finding{{Check: check, Status: doctor.OK, Found: fmt.Sprintf("all %d are served at %s", len(kinds), crd.GroupVersion.Version)}}
}

func serves(d *apiextensionsv1.CustomResourceDefinition, version string) bool {
	established := slices.ContainsFunc(d.Status.Conditions, func(c apiextensionsv1.CustomResourceDefinitionCondition) bool {
		return c.Type == apiextensionsv1.Established && c.Status == apiextensionsv1.ConditionTrue
	})
	return established && slices.ContainsFunc(d.Spec.Versions, func(v apiextensionsv1.CustomResourceDefinitionVersion) bool { return v.Name == version && v.Served })
}

func (c *Client) checkDaemons(ctx context.Context) []doctor.Finding {
	s, err := c.Status(ctx)
	if err != nil {
		return []doctor.Finding{unable("cluster.daemons", err)}
	}
	var findings []doctor.Finding
	for _, name := range []string{nodeagent, poolmanager, gateway} {
		findings = append(findings, checkDaemon(name, s.Daemons))
	}
	return append(findings, checkLeader(s), checkNodes(s))
}

func checkDaemon(name string, all []Daemon) doctor.Finding {
	check := "cluster." + name
	var ready, total int
	var waiting []string
	versions := map[string]bool{}
	for _, d := range all {
		if d.Name != name {
			continue
		}
		total++
		versions[d.Version] = true
		if d.Ready {
			ready++
			continue
		}
		waiting = append(waiting, fmt.Sprintf("%s on %s: %s", d.Pod, d.Node, d.Reason))
	}
	found := fmt.Sprintf("%d of %d ready", ready, total)
	switch {
	case ready == 0:
		return doctor.Finding{Check: check, Status: doctor.Problem, Found: strings.Join(append([]string{found}, waiting...), "; "), Meaning: "nothing starts without it",
			Fix: do("see `kubectl -n %s describe pods -l %s=%s`", SystemNamespace, componentLabel, name)}
	case ready < total:
		return doctor.Finding{Check: check, Status: doctor.Warning, Found: strings.Join(append([]string{found}, waiting...), "; "), Meaning: "less stands ready than should",
			Fix: do("see `kubectl -n %s describe pods -l %s=%s`", SystemNamespace, componentLabel, name)}
	case len(versions) > 1:
		return doctor.Finding{Check: check, Status: doctor.Warning, Found: found + ", of several versions", Meaning: "an upgrade is under way, or stuck",
			Fix: do("see `kubectl -n %s rollout status`", SystemNamespace)}
	}
	return doctor.Finding{Check: check, Status: doctor.OK, Found: found}
}

func checkLeader(s *Status) doctor.Finding {
	const check = "cluster.leader"
	if s.Leader == "" {
		return doctor.Finding{Check: check, Status: doctor.Problem, Found: "no poolmanager holds the Lease " + leaseName, Meaning: "requests to functions at zero are not answered",
			Fix: do("see `kubectl -n %s logs -l %s=%s`", SystemNamespace, componentLabel, poolmanager)}
	}
	return doctor.Finding{Check: check, Status: doctor.OK, Found: fmt.Sprintf("%s, epoch %d", s.Leader, s.Epoch)}
}

func checkNodes(s *Status) doctor.Finding {
	const check = "cluster.nodes"
	var without []string
	for _, n := range s.Nodes {
		if n.Ready && n.Schedulable && !n.Nodeagent {
			without = append(without, n.Name)
		}
	}
	if len(without) > 0 {
		return doctor.Finding{Check: check, Status: doctor.Warning, Found: "nodeagent does not serve on " + strings.Join(without, ", "), Meaning: "functions do not start there",
			Fix: do("if they should: see that the DaemonSet nodeagent tolerates their taints, and `hearth node doctor` on them")}
	}
	with := 0
	for _, n := range s.Nodes {
		if n.Nodeagent {
			with++
		}
	}
	return doctor.Finding{Check: check, Status: doctor.OK, Found: fmt.Sprintf("nodeagent serves on %d of %d", with, len(s.Nodes))}
}

// certificates are the Secrets of the daemons' certificates.
var certificates = []string{"hearth-ca", "hearth-tls-nodeagent", "hearth-tls-poolmanager", "hearth-tls-gateway", "hearth-tls-admin"}

func (c *Client) checkCertificates(ctx context.Context) []doctor.Finding {
	const check = "cluster.certificates"
	var first time.Time
	for _, name := range certificates {
		var secret corev1.Secret
		if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: name}, &secret); err != nil {
			return []doctor.Finding{unable(check, err)}
		}
		expiry, err := expiryOf(secret.Data[corev1.TLSCertKey])
		if err != nil {
			return []doctor.Finding{{Check: check, Status: doctor.Problem, Found: fmt.Sprintf("Secret %s: %v", name, err), Meaning: "the daemons do not talk to each other",
				Fix: do("delete the Secret: poolmanager makes another")}}
		}
		if left := expiry.Sub(c.now()); left < expirySoon {
			return []doctor.Finding{{Check: check, Status: doctor.Problem, Found: fmt.Sprintf("the certificate of Secret %s expires at %s", name, expiry.UTC().Format(time.RFC3339)),
				Meaning: "poolmanager should have renewed it; the daemons stop to talk to each other then", Fix: do("see that poolmanager is ready, and its log")}}
		}
		if first.IsZero() || expiry.Before(first) {
			first = expiry
		}
	}
	return []doctor.Finding{{Check: check, Status: doctor.OK, Found: "the first expires at " + first.UTC().Format(time.RFC3339)}}
}

// expiryOf is when the first certificate of a PEM file ends.
func expiryOf(data []byte) (time.Time, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return time.Time{}, fmt.Errorf("has no certificate")
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}, fmt.Errorf("its certificate cannot be read: %w", err)
	}
	return certificate.NotAfter, nil
}

// right is something that a command does as this user.
type right struct {
	command                                    string
	verb, group, resource, subresource, inside string
}

func (c *Client) rights() []right {
	group := crd.GroupVersion.Group
	return []right{
		{"hearth deploy", "patch", group, "functions", "", c.namespace},
		{"hearth deploy --secret", "patch", "", "secrets", "", c.namespace},
		{"hearth delete", "delete", group, "functions", "", c.namespace},
		{"hearth ps", "list", "", "pods", "", c.namespace},
		{"hearth logs", "get", "", "pods", "log", c.namespace},
		{"hearth status", "list", "", "pods", "", SystemNamespace},
		{"hearth invoke", "create", "", "pods", "portforward", SystemNamespace},
	}
}

func (c *Client) checkRights(ctx context.Context) []doctor.Finding {
	const check = "cluster.rights"
	var lacking []string
	for _, r := range c.rights() {
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: r.inside, Verb: r.verb, Group: r.group, Resource: r.resource, Subresource: r.subresource,
		}}}
		if err := c.api.Create(ctx, review); err != nil {
			return []doctor.Finding{unable(check, err)}
		}
		if !review.Status.Allowed {
			lacking = append(lacking, fmt.Sprintf("%s (%s %s in %s)", r.command, r.verb, strings.Trim(r.resource+"/"+r.subresource, "/"), r.inside))
		}
	}
	if len(lacking) > 0 {
		return []doctor.Finding{{Check: check, Status: doctor.Warning, Found: "you may not: " + strings.Join(lacking, ", "), Meaning: "these commands fail for you",
			Fix: do("have an administrator bind the rights to you, as Roles in these namespaces")}}
	}
	return []doctor.Finding{{Check: check, Status: doctor.OK, Found: "you may deploy, delete, invoke and read logs"}}
}

func (c *Client) checkGateway(ctx context.Context) []doctor.Finding {
	const check = "cluster.gateway"
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	address, closed, err := c.ForwardGateway(ctx)
	if err != nil {
		return []doctor.Finding{unable(check, err)}
	}
	defer closed()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		return []doctor.Finding{unable(check, err)}
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return []doctor.Finding{{Check: check, Status: doctor.Problem, Found: "it does not answer through a forwarded port: " + err.Error(), Meaning: "callers get no answer either, or ports cannot be forwarded",
			Fix: do("see `kubectl -n %s logs -l %s=%s`", SystemNamespace, componentLabel, gateway)}}
	}
	defer resp.Body.Close()
	return []doctor.Finding{{Check: check, Status: doctor.OK, Found: "answers through a forwarded port"}}
}
