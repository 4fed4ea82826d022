package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"connectrpc.com/connect"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/pki"
)

const (
	// poolPort is where poolmanagers answer over TLS.
	poolPort = 7444
	// adminSecret has the certificate of people who ask daemons.
	adminSecret = "hearth-tls-admin"
)

// Imports asks the poolmanager that leads what Functions import, through a forwarded port and with the administrators' certificate.
// Errors: Unavailable (nobody leads), NotFound (no such Runtime), PermissionDenied (the user may not read that certificate, or not forward ports).
func (c *Client) Imports(ctx context.Context, runtime string) (*hearthv1.ListImportsResponse, error) {
	keys, err := c.adminKeys(ctx)
	if err != nil {
		return nil, err
	}
	leader, _, err := c.leader(ctx)
	if err != nil {
		return nil, err
	}
	name, _, _ := strings.Cut(leader, "_") // what follows tells its restarts apart
	if name == "" {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("no poolmanager leads; see `hearth doctor`"))
	}
	var pod corev1.Pod
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: name}, &pod); err != nil {
		return nil, c.coded(err)
	}
	address, closed, err := c.forward(ctx, &pod, poolPort)
	if err != nil {
		return nil, err
	}
	defer closed()
	http := daemon.TLSClient(keys, pki.Poolmanager, address)
	defer http.CloseIdleConnections()
	resp, err := hearthv1connect.NewRuntimeServiceClient(http, "http://hearth").ListImports(ctx, connect.NewRequest(&hearthv1.ListImportsRequest{Runtime: runtime}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// adminKeys are those of the cluster's Secret. They lie in a folder, as all keys that are used, for no longer than it takes to read them.
func (c *Client) adminKeys(ctx context.Context) (keys *pki.Dir, err error) {
	var secret corev1.Secret
	if err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: adminSecret}, &secret); err != nil {
		return nil, c.coded(err)
	}
	dir, err := os.MkdirTemp("", "hearth-admin-") // others cannot enter it
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	bundle := pki.Bundle{Authorities: secret.Data[pki.AuthorityFile], Certificate: secret.Data[pki.CertificateFile], Key: secret.Data[pki.KeyFile]}
	if err := pki.WriteDir(dir, bundle); err != nil {
		return nil, err
	}
	if keys, err = pki.OpenDir(dir, slog.New(slog.DiscardHandler)); err != nil {
		return nil, fmt.Errorf("Secret %s: %w", adminSecret, err)
	}
	return keys, nil
}
