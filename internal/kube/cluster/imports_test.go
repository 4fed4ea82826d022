package cluster_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/api/v1alpha1/hearthv1connect"
	"github.com/hearth-serverless/hearth/internal/daemon"
	"github.com/hearth-serverless/hearth/internal/kube/kubetest"
	"github.com/hearth-serverless/hearth/internal/pki"
)

// knower is a poolmanager that knows what one Runtime's Functions import.
type knower struct {
	hearthv1connect.UnimplementedRuntimeServiceHandler
}

func (knower) ListImports(_ context.Context, r *connect.Request[hearthv1.ListImportsRequest]) (*connect.Response[hearthv1.ListImportsResponse], error) {
	if r.Msg.GetRuntime() != "python" {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("there is no runtime %s", r.Msg.GetRuntime()))
	}
	return connect.NewResponse(&hearthv1.ListImportsResponse{Runtimes: []*hearthv1.RuntimeImports{{Runtime: "python", Starts: 3}}}), nil
}

// serveAdmins serves knower over TLS to those who have an administrator's certificate, and returns where, and that certificate.
func serveAdmins(t *testing.T) (address string, admin pki.Bundle) {
	t.Helper()
	var none pki.Authorities
	authorities, _, err := none.Renew(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	own, err := authorities.Issue(time.Now(), pki.Poolmanager)
	if err != nil {
		t.Fatal(err)
	}
	if admin, err = authorities.Issue(time.Now(), pki.Admin); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := pki.WriteDir(dir, own); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	keys, err := pki.OpenDir(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	l, err := daemon.ListenTLS(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hearthv1connect.NewRuntimeServiceHandler(knower{}))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- daemon.ServeTLS(ctx, log, l, keys, mux, pki.Admin) }()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return l.Addr().String(), admin
}

func TestImports(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	if _, err := c.Imports(t.Context(), "python"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("without a certificate: %v", err)
	}
	address, admin := serveAdmins(t)
	s.Put(system+"secrets/hearth-tls-admin", map[string]any{"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": "hearth-tls-admin"},
		"data": map[string]any{pki.AuthorityFile: admin.Authorities, pki.CertificateFile: admin.Certificate, pki.KeyFile: admin.Key}})
	if _, err := c.Imports(t.Context(), "python"); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("without a leader: %v", err)
	}
	daemons(s)
	s.Ports["poolmanager-x"] = address
	got, err := c.Imports(t.Context(), "python")
	if err != nil || len(got.GetRuntimes()) != 1 || got.GetRuntimes()[0].GetStarts() != 3 {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := c.Imports(t.Context(), "other"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("of another Runtime: %v", err)
	}
}
