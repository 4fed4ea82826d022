package cluster_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/internal/doctor"
	"github.com/hearth-serverless/hearth/internal/kube/cluster"
	"github.com/hearth-serverless/hearth/internal/kube/kubetest"
)

const (
	functions = "/apis/hearth.dev/v1alpha1/namespaces/hearth/functions/"
	pools     = "/apis/hearth.dev/v1alpha1/namespaces/hearth/warmpools/"
	pods      = "/api/v1/namespaces/hearth/pods/"
	system    = "/api/v1/namespaces/hearth-system/"
)

func open(t *testing.T, s *kubetest.Server) *cluster.Client {
	t.Helper()
	c, err := cluster.Open(cluster.Config{Kubeconfig: s.Kubeconfig(t)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// condition sets one condition of an object, of its present generation.
func condition(u *unstructured.Unstructured, kind, status, reason, message string) {
	u.Object["status"] = map[string]any{"observedGeneration": u.GetGeneration(), "latestRevision": u.GetName() + "-00001", "conditions": []any{
		map[string]any{"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"},
	}}
}

func ready(u *unstructured.Unstructured) { condition(u, "Ready", "True", "Serving", "") }

func quiet(string) {}

func TestFunctionsGoThereAndBack(t *testing.T) {
	s := kubetest.New(t)
	s.OnWrite = func(u *unstructured.Unstructured) {
		if u.GetKind() == "Function" {
			ready(u)
		}
	}
	c := open(t, s)
	sent := &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{
		Image: "reg/hello:1", Port: 3000, Env: map[string]string{"A": "b=c"}, Command: []string{"/serve"}, Args: []string{"--fast"}, Hosts: []string{"hello.example"},
		Secrets: map[string][]byte{"token": []byte("s3cret")}, Tenant: "acme", WritableRoot: true, Timeout: durationpb.New(time.Minute),
		Resources: &hearthv1.Resources{MemoryBytes: 512 << 20, CpuMillis: 500},
		Scaling:   &hearthv1.Scaling{Concurrency: 4, Min: 1, Max: 5, Window: durationpb.New(30 * time.Second), Grace: durationpb.New(0), Queue: 7, Frozen: -1},
	}}
	if _, err := c.ApplyFunction(t.Context(), sent, true, quiet); err != nil {
		t.Fatal(err)
	}
	list, err := c.Functions(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	sent.Spec.Secrets = map[string][]byte{"token": nil}
	if diff := cmp.Diff(sent.GetSpec(), list[0].GetSpec(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if list[0].GetStatus().GetRevision() != "hello-00001" {
		t.Errorf("status %v", list[0].GetStatus())
	}
	secret := s.Get("/api/v1/namespaces/hearth/secrets/hearth-hello")
	if secret == nil || len(secret.GetOwnerReferences()) != 1 || secret.GetOwnerReferences()[0].Name != "hello" {
		t.Fatalf("the secret is not the function's: %v", secret)
	}
	before := secret.Object["data"]
	if _, err := c.ApplyFunction(t.Context(), sent, true, quiet); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, s.Get("/api/v1/namespaces/hearth/secrets/hearth-hello").Object["data"]); diff != "" {
		t.Errorf("an empty value does not keep what there is: %s", diff)
	}
	if u := s.Get(functions + "hello"); u.Object["metadata"].(map[string]any)["managedFields"] != nil {
		t.Error("managed fields were applied")
	}
}

// TestWaits has a Function become ready while it is waited for, and says what it waits for.
func TestWaits(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	var told []string
	tell := func(text string) {
		told = append(told, text)
		next := func(u *unstructured.Unstructured) { condition(u, "Ready", "False", "Pulling", "on 1 of 2 nodes") }
		if len(told) > 1 {
			next = ready
		}
		s.Change(functions+"hello", next)
	}
	f := &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{Image: "x"}}
	got, err := c.ApplyFunction(t.Context(), f, true, tell)
	if err != nil || got.GetStatus().GetRevision() != "hello-00001" {
		t.Fatalf("%v, %v", got, err)
	}
	if want := []string{"waiting for poolmanager to take it over", "Pulling: on 1 of 2 nodes"}; !slices.Equal(told, want) {
		t.Errorf("told %q", told)
	}
}

func TestRefused(t *testing.T) {
	s := kubetest.New(t)
	s.OnWrite = func(u *unstructured.Unstructured) { condition(u, "Accepted", "False", "Invalid", "env is too large") }
	_, err := open(t, s).ApplyFunction(t.Context(), &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{Image: "x"}}, true, quiet)
	if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "env is too large") {
		t.Error(err)
	}
}

func TestDeletedMeanwhile(t *testing.T) {
	s := kubetest.New(t)
	_, err := open(t, s).ApplyFunction(t.Context(), &hearthv1.Function{Name: "hello", Spec: &hearthv1.FunctionSpec{Image: "x"}}, true,
		func(string) { s.Remove(functions + "hello") })
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
}

func TestDelete(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	if err := c.DeleteFunction(t.Context(), "hello"); connect.CodeOf(err) != connect.CodeNotFound || !strings.Contains(err.Error(), "there is no function hello") {
		t.Error(err)
	}
	s.Put(functions+"hello", object("Function", "hello"))
	if err := c.DeleteFunction(t.Context(), "hello"); err != nil || s.Get(functions+"hello") != nil {
		t.Error(err)
	}
}

func object(kind, name string) map[string]any {
	return map[string]any{"apiVersion": "hearth.dev/v1alpha1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": "hearth"}, "spec": map[string]any{}}
}

func TestRuntimesAndTheirPools(t *testing.T) {
	s := kubetest.New(t)
	s.OnWrite = ready
	c := open(t, s)
	apply := func(warm int32) {
		t.Helper()
		r := &hearthv1.Runtime{Name: "python", Image: "reg/python:1", Preload: []string{"numpy"}, Env: map[string]string{"A": "b"}, Warm: warm}
		if _, err := c.ApplyRuntime(t.Context(), r, true, quiet); err != nil {
			t.Fatal(err)
		}
		list, err := c.Runtimes(t.Context())
		r.Generation, r.Status = 1, &hearthv1.RuntimeStatus{}
		if diff := cmp.Diff([]*hearthv1.Runtime{r}, list, protocmp.Transform()); diff != "" || err != nil {
			t.Error(diff, err)
		}
	}
	apply(2)
	if owners := s.Get(pools + "python").GetOwnerReferences(); len(owners) != 1 || owners[0].Name != "python" {
		t.Errorf("the pool is owned by %v", owners)
	}
	apply(0)
	if s.Get(pools+"python") != nil {
		t.Error("the pool is still there")
	}
	f := object("Function", "hello")
	f["spec"] = map[string]any{"runtime": "python"}
	s.Put(functions+"hello", f)
	if err := c.DeleteRuntime(t.Context(), "python"); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Error(err)
	}
	s.Remove(functions + "hello")
	if err := c.DeleteRuntime(t.Context(), "python"); err != nil {
		t.Error(err)
	}
	if err := c.DeleteRuntime(t.Context(), "python"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
}

// pod is an Instance's, or a daemon's.
func pod(name, node string, labels map[string]string, isReady bool) *corev1.Pod {
	p := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "hearth", Labels: labels},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "reg:5000/hearth/x:v7"}}}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	if isReady {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	return p
}

func TestInstancesAndLogs(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	s.Put(functions+"hello", object("Function", "hello"))
	s.Put(pods+"i-1", pod("i-1", "n1", map[string]string{"hearth.dev/instance": "i-1", "hearth.dev/function": "hello", "hearth.dev/revision": "hello-00001"}, true))
	s.Put(pods+"i-2", pod("i-2", "n2", map[string]string{"hearth.dev/instance": "i-2"}, true))
	s.Put(pods+"i-3", pod("i-3", "", map[string]string{"hearth.dev/instance": "i-3"}, false))
	s.Put(pods+"other", pod("other", "n2", nil, true))
	list, err := c.Instances(t.Context(), "")
	if err != nil || len(list) != 3 {
		t.Fatalf("%v, %v", list, err)
	}
	states := map[string]hearthv1.State{}
	for _, i := range list {
		states[i.GetId()] = i.GetState()
	}
	if want := map[string]hearthv1.State{"i-1": hearthv1.State_STATE_SERVING, "i-2": hearthv1.State_STATE_WARM, "i-3": hearthv1.State_STATE_CREATING}; !cmp.Equal(states, want) {
		t.Errorf("states %v", states)
	}
	if mine, err := c.Instances(t.Context(), "hello"); err != nil || len(mine) != 1 || mine[0].GetNode() != "n1" || mine[0].GetRevision() != "hello-00001" {
		t.Errorf("%v, %v", mine, err)
	}
	long := strings.Repeat("x", 100<<10)
	s.Logs["i-1"] = "one\n" + long + "\nlast"
	var lines []string
	read := func(req *hearthv1.LogsRequest) error {
		return c.Logs(t.Context(), req, func(m *hearthv1.LogsResponse) error {
			lines = append(lines, m.GetInstanceId()+" "+string(m.GetLine()))
			return nil
		})
	}
	if err := read(&hearthv1.LogsRequest{Function: "hello"}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"i-1 one", "i-1 " + long[:64<<10], "i-1 " + long[64<<10:], "i-1 last"}; !slices.Equal(lines, want) {
		t.Errorf("%d lines, %.300q", len(lines), lines)
	}
	if err := read(&hearthv1.LogsRequest{Function: "none"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Error(err)
	}
	if err := read(&hearthv1.LogsRequest{Function: "hello", InstanceId: "i-2"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("the log of another's instance: %v", err)
	}
}

// TestLogsFollowNewInstances has an Instance become the Function's while its log is followed.
func TestLogsFollowNewInstances(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	s.Put(functions+"hello", object("Function", "hello"))
	s.Put(pods+"i-1", pod("i-1", "n1", map[string]string{"hearth.dev/instance": "i-1", "hearth.dev/function": "hello"}, true))
	s.Put(pods+"i-2", pod("i-2", "n1", map[string]string{"hearth.dev/instance": "i-2"}, true))
	s.Logs["i-1"], s.Logs["i-2"] = "one\n", "two\n"
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var lines []string
	err := c.Logs(ctx, &hearthv1.LogsRequest{Function: "hello", Follow: true}, func(m *hearthv1.LogsResponse) error {
		lines = append(lines, string(m.GetLine()))
		if len(lines) == 1 {
			s.Change(pods+"i-2", func(u *unstructured.Unstructured) {
				u.SetLabels(map[string]string{"hearth.dev/instance": "i-2", "hearth.dev/function": "hello"})
			})
			return nil
		}
		cancel()
		return nil
	})
	if connect.CodeOf(err) != connect.CodeCanceled || !slices.Equal(lines, []string{"one", "two"}) {
		t.Errorf("%v, lines %q", err, lines)
	}
}

// daemons puts the daemons of a healthy cluster of one node there.
func daemons(s *kubetest.Server) {
	for _, name := range []string{"nodeagent", "poolmanager", "gateway"} {
		p := pod(name+"-x", "n1", map[string]string{"app.kubernetes.io/name": "hearth", "app.kubernetes.io/component": name}, true)
		p.Namespace = "hearth-system"
		s.Put(system+"pods/"+p.Name, p)
	}
	s.Put("/apis/coordination.k8s.io/v1/namespaces/hearth-system/leases/hearth-poolmanager", map[string]any{
		"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
		"metadata": map[string]any{"name": "hearth-poolmanager", "annotations": map[string]any{"hearth.dev/epoch": "7"}},
		"spec":     map[string]any{"holderIdentity": "poolmanager-x_1", "leaseDurationSeconds": 4, "renewTime": time.Now().UTC().Format(metav1.RFC3339Micro)},
	})
	s.Put("/api/v1/nodes/n1", map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": "n1"},
		"status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}})
}

func TestStatus(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	if _, err := c.Status(t.Context()); connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "hearth install") {
		t.Errorf("without daemons: %v", err)
	}
	daemons(s)
	got, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got.Context != "test" || got.Leader != "poolmanager-x_1" || got.Epoch != 7 || len(got.Daemons) != 3 || len(got.Nodes) != 1 || !got.Nodes[0].Nodeagent {
		t.Errorf("%+v", got)
	}
	for _, d := range got.Daemons {
		if d.Version != "v7" || !d.Ready || d.Leader != (d.Name == "poolmanager") {
			t.Errorf("%+v", d)
		}
	}
}

func TestGateway(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	if _, _, err := c.ForwardGateway(t.Context()); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("without a gateway: %v", err)
	}
	daemons(s)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	defer web.Close()
	s.Ports["gateway-x"] = strings.TrimPrefix(web.URL, "http://")
	address, closed, err := c.ForwardGateway(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer closed()
	sent := bytes.Repeat([]byte("0123456789"), 100_000)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Post("http://"+address, "text/plain", bytes.NewReader(sent))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
}

func TestDoctor(t *testing.T) {
	s := kubetest.New(t)
	c := open(t, s)
	statuses := func() map[string]doctor.Status {
		t.Helper()
		findings, err := c.Diagnose(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]doctor.Status{}
		for _, f := range findings {
			out[f.Check] = f.Status
			if f.Status != doctor.OK && f.Found == "" {
				t.Errorf("%+v says nothing", f)
			}
		}
		return out
	}
	if got := statuses(); got["cluster.crds"] != doctor.Problem || got["cluster.daemons"] != doctor.Problem || got["cluster.certificates"] != doctor.Problem {
		t.Errorf("an empty cluster: %v", got)
	}
	daemons(s)
	for _, kind := range []string{"functions", "revisions", "runtimes", "warmpools"} {
		s.Put("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+kind+".hearth.dev", map[string]any{
			"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": kind + ".hearth.dev"},
			"spec":   map[string]any{"group": "hearth.dev", "versions": []any{map[string]any{"name": "v1alpha1", "served": true}}},
			"status": map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}},
		})
	}
	certify := func(left time.Duration) {
		for _, name := range []string{"hearth-ca", "hearth-tls-nodeagent", "hearth-tls-poolmanager", "hearth-tls-gateway", "hearth-tls-admin"} {
			s.Put(system+"secrets/"+name, &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, Data: map[string][]byte{"tls.crt": certificate(t, left)}})
		}
	}
	certify(90 * 24 * time.Hour)
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	s.Ports["gateway-x"] = strings.TrimPrefix(web.URL, "http://")
	for check, status := range statuses() {
		if status != doctor.OK {
			t.Errorf("%s: %s in a healthy cluster", check, status)
		}
	}
	certify(time.Hour)
	s.Denied = []string{"create pods/portforward"}
	if got := statuses(); got["cluster.certificates"] != doctor.Problem || got["cluster.rights"] != doctor.Warning {
		t.Errorf("%v", got)
	}
}

func certificate(t *testing.T, left time.Duration) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(left)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// controllers makes of what Install and Uninstall write what a cluster of two nodes would.
func controllers(u *unstructured.Unstructured) {
	g := u.GetGeneration()
	switch u.GetKind() {
	case "DaemonSet":
		u.Object["status"] = map[string]any{"observedGeneration": g, "desiredNumberScheduled": int64(2), "updatedNumberScheduled": int64(2), "numberReady": int64(2)}
	case "Deployment":
		u.Object["status"] = map[string]any{"observedGeneration": g, "replicas": int64(2), "updatedReplicas": int64(2), "availableReplicas": int64(2)}
	case "CustomResourceDefinition":
		u.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}
	}
}

func TestInstallAndUninstall(t *testing.T) {
	s := kubetest.New(t)
	s.OnWrite = controllers
	c := open(t, s)
	in := cluster.Installation{Registry: "reg:5000", Images: map[string]string{"hearth/nodeagent": "reg:5000/hearth/nodeagent:v7", "hearth/pause": "reg:5000/hearth/pause:v7"}}
	for range 2 { // again is as good
		if err := c.Install(t.Context(), in, time.Minute, quiet); err != nil {
			t.Fatal(err)
		}
	}
	if host, err := c.Registry(t.Context()); err != nil || host != "reg:5000" {
		t.Errorf("registry %q, %v", host, err)
	}
	objects, err := deploy.Objects(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(s.Paths()); got != len(objects)+1 {
		t.Errorf("%d objects are there, of %d", got, len(objects)+1)
	}
	if first := s.Writes()[0]; first != "PATCH /api/v1/namespaces/hearth-system" {
		t.Errorf("begins with %s", first)
	}
	agents := s.Get("/apis/apps/v1/namespaces/hearth-system/daemonsets/nodeagent")
	if text := text(t, agents); !strings.Contains(text, "reg:5000/hearth/nodeagent:v7") || strings.Contains(text, "hearth/nodeagent:dev") {
		t.Error("nodeagent's image is not replaced")
	}
	s.Put(functions+"hello", object("Function", "hello"))
	s.Put(system+"secrets/hearth-ca", map[string]any{"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": "hearth-ca", "namespace": "hearth-system"}})
	if err := c.Uninstall(t.Context(), cluster.Removal{Kinds: true, Within: time.Minute}, quiet); err != nil {
		t.Fatal(err)
	}
	if left := s.Paths(); len(left) > 0 {
		t.Errorf("leaves %q", left)
	}
	order(t, s.Writes(), "DELETE "+functions[:len(functions)-1], "PATCH /apis/apps/v1/namespaces/hearth-system/daemonsets/hearth-unregister",
		"DELETE /apis/apps/v1/namespaces/hearth-system/daemonsets/nodeagent", "PUT /apis/apps/v1/namespaces/hearth-system/daemonsets/hearth-unregister",
		"DELETE /apis/apps/v1/namespaces/hearth-system/daemonsets/hearth-unregister", "DELETE /api/v1/namespaces/hearth-system")
	if err := c.Uninstall(t.Context(), cluster.Removal{Kinds: true, Within: time.Minute}, quiet); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// TestUninstallGoesOn has the first attempt break off when nodeagent has gone and no node is given back yet.
func TestUninstallGoesOn(t *testing.T) {
	s := kubetest.New(t)
	s.OnWrite = func(u *unstructured.Unstructured) {
		controllers(u)
		if u.GetName() == "hearth-unregister" {
			u.Object["status"] = map[string]any{"observedGeneration": u.GetGeneration(), "desiredNumberScheduled": int64(2), "updatedNumberScheduled": int64(2), "numberReady": int64(1)}
		}
	}
	c := open(t, s)
	if err := c.Install(t.Context(), cluster.Installation{}, time.Minute, quiet); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := c.Uninstall(ctx, cluster.Removal{Within: time.Minute}, func(text string) {
		if strings.HasPrefix(text, "waiting for nodes to be given back (1 of 2)") {
			cancel()
		}
	})
	if connect.CodeOf(err) != connect.CodeCanceled {
		t.Fatal(err)
	}
	set := "/apis/apps/v1/namespaces/hearth-system/daemonsets/"
	if s.Get(set+"nodeagent") != nil || s.Get(set+"hearth-unregister") == nil {
		t.Fatal("not where it should have broken off")
	}
	s.Change(set+"hearth-unregister", controllers)
	if err := c.Uninstall(t.Context(), cluster.Removal{Within: time.Minute}, quiet); err != nil {
		t.Fatal(err)
	}
	for _, path := range s.Paths() {
		if !strings.Contains(path, "/customresourcedefinitions/") {
			t.Errorf("leaves %s", path)
		}
	}
}

func text(t *testing.T, u *unstructured.Unstructured) string {
	t.Helper()
	data, err := u.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// order checks that words come in this order.
func order(t *testing.T, list []string, words ...string) {
	t.Helper()
	for _, word := range words {
		i := slices.Index(list, word)
		if i < 0 {
			t.Fatalf("%q does not come, or not in order", word)
		}
		list = list[i+1:]
	}
}

func TestYAML(t *testing.T) {
	text, err := cluster.Installation{Registry: "reg:5000"}.YAML()
	if err != nil || !strings.Contains(string(text), "registry: reg:5000") || strings.Count(string(text), "kind: CustomResourceDefinition") != 4 {
		t.Errorf("%v: %.200s", err, text)
	}
}

// TestRestartCommand: it reaches the container that registers nodeagent, and nothing else.
func TestRestartCommand(t *testing.T) {
	text, err := cluster.Installation{RestartCommand: "kill $CONTAINERD_PID"}.YAML()
	if err != nil || strings.Count(string(text), "HEARTH_RESTART_COMMAND") != 1 || !strings.Contains(string(text), "value: kill $CONTAINERD_PID") {
		t.Errorf("%v; named %d times", err, strings.Count(string(text), "HEARTH_RESTART_COMMAND"))
	}
}

func TestNoCluster(t *testing.T) {
	t.Setenv("KUBECONFIG", "/nowhere")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if cluster.Configured(cluster.Config{}) {
		t.Error("a cluster from nowhere")
	}
	if _, err := cluster.Open(cluster.Config{}); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Error(err)
	}
	s := kubetest.New(t)
	t.Setenv("KUBECONFIG", s.Kubeconfig(t))
	if !cluster.Configured(cluster.Config{}) {
		t.Error("$KUBECONFIG is not seen")
	}
	if _, err := cluster.Open(cluster.Config{Context: "none"}); err == nil {
		t.Error("a context that is not there")
	}
}
