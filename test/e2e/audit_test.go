package e2e_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/test/e2e"
)

const poolmanager = "system:serviceaccount:hearth-system:hearth-poolmanager"

// line is an event as the API server writes it.
func line(user, verb, group, resource, sub, namespace, name string) string {
	return fmt.Sprintf(`{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"1","stage":"ResponseComplete",`+
		`"requestURI":"/x","verb":%q,"user":{"username":%q,"uid":"2","groups":["system:authenticated"]},"sourceIPs":["10.0.0.1"],`+
		`"objectRef":{"resource":%q,"namespace":%q,"name":%q,"apiGroup":%q,"apiVersion":"v1","subresource":%q},`+
		`"responseStatus":{"metadata":{},"code":200},"annotations":{"authorization.k8s.io/decision":"allow"}}`+"\n",
		verb, user, resource, namespace, name, group, sub)
}

// rights is a role in a small cluster.
func rights(rules ...map[string]any) []map[string]any {
	subject := []any{map[string]any{"kind": "ServiceAccount", "name": "hearth-poolmanager", "namespace": "hearth-system"}}
	other := []any{map[string]any{"kind": "ServiceAccount", "name": "other", "namespace": "hearth-system"}}
	meta := func(namespace, name string) map[string]any {
		return map[string]any{"namespace": namespace, "name": name}
	}
	var all []any
	for _, r := range rules {
		all = append(all, r)
	}
	return []map[string]any{
		{"kind": "Namespace", "metadata": meta("", "hearth")},
		{"kind": "Role", "metadata": meta("hearth", "r"), "rules": all},
		{"kind": "RoleBinding", "metadata": meta("hearth", "b"), "roleRef": map[string]any{"kind": "Role", "name": "r"}, "subjects": subject},
		{"kind": "ClusterRole", "metadata": meta("", "c"), "rules": []any{rule("", "nodes", "list")}},
		{"kind": "ClusterRoleBinding", "metadata": meta("", "c"), "roleRef": map[string]any{"kind": "ClusterRole", "name": "c"}, "subjects": subject},
		{"kind": "ClusterRole", "metadata": meta("", "d"), "rules": []any{rule("", "secrets", "list")}},
		{"kind": "ClusterRoleBinding", "metadata": meta("", "d"), "roleRef": map[string]any{"kind": "ClusterRole", "name": "d"}, "subjects": other},
	}
}

func rule(group, resource, verb string, names ...string) map[string]any {
	r := map[string]any{"apiGroups": []any{group}, "resources": []any{resource}, "verbs": []any{verb}}
	var all []any
	for _, n := range names {
		all = append(all, n)
	}
	if all != nil {
		r["resourceNames"] = all
	}
	return r
}

func TestCompareRights(t *testing.T) {
	all := []map[string]any{
		rule("", "pods", "create"), rule("", "pods/resize", "patch"), rule("hearth.dev", "functions/status", "patch"),
		rule("", "secrets", "get", "a", "b"), rule("", "events", "create"),
	}
	nodes := line(poolmanager, "list", "", "nodes", "", "", "")
	for name, c := range map[string]struct {
		log             []string
		unused, missing []string
	}{
		"all": {[]string{
			nodes, line(poolmanager, "create", "", "pods", "", "hearth", ""), line(poolmanager, "patch", "", "pods", "resize", "hearth", "p"),
			line(poolmanager, "patch", "hearth.dev", "functions", "status", "hearth", "f"),
			line(poolmanager, "get", "", "secrets", "", "hearth", "a"), line(poolmanager, "get", "", "secrets", "", "hearth", "b"),
			line(poolmanager, "create", "", "events", "", "hearth", ""), nodes,
		}, nil, nil},
		"others' deeds": {[]string{
			nodes, line("system:serviceaccount:hearth:hearth-poolmanager", "create", "", "pods", "", "hearth", ""),
			line("system:admin", "patch", "", "pods", "resize", "hearth", "p"), line(poolmanager, "get", "", "secrets", "", "hearth", "a"),
			line(poolmanager, "create", "", "events", "", "hearth", ""), line(poolmanager, "patch", "hearth.dev", "functions", "status", "hearth", "f"),
		}, []string{"create pods in hearth", "get secrets b in hearth", "patch pods/resize in hearth"}, nil},
		"nothing": {nil, []string{"create events in hearth", "create pods in hearth", "get secrets a in hearth", "get secrets b in hearth", "list nodes",
			"patch functions.hearth.dev/status in hearth", "patch pods/resize in hearth"}, nil},
		"too much": {[]string{
			nodes, line(poolmanager, "create", "", "pods", "", "kube-system", ""), line(poolmanager, "patch", "", "pods", "", "hearth", "p"),
			line(poolmanager, "get", "", "secrets", "", "hearth", "c"), line(poolmanager, "list", "", "secrets", "", "", ""),
		}, []string{"create events in hearth", "create pods in hearth", "get secrets a in hearth", "get secrets b in hearth",
			"patch functions.hearth.dev/status in hearth", "patch pods/resize in hearth"},
			[]string{"create pods in kube-system", "get secrets c in hearth", "list secrets", "patch pods p in hearth"}},
		"discovery": {[]string{
			nodes, `{"stage":"ResponseComplete","verb":"get","user":{"username":"` + poolmanager + `"},"requestURI":"/apis"}` + "\n",
			line(poolmanager, "patch", "hearth.dev", "functions", "status", "hearth", "f"), line(poolmanager, "create", "", "pods", "", "hearth", "p"),
			line(poolmanager, "patch", "", "pods", "resize", "hearth", "p"), line(poolmanager, "create", "", "events", "", "hearth", "e"),
			line(poolmanager, "get", "", "secrets", "", "hearth", "a"), line(poolmanager, "get", "", "secrets", "", "hearth", "b"), `{"stage":"Resp`,
		}, nil, nil},
	} {
		unused, missing, err := e2e.CompareRights(rights(all...), "hearth-system", "hearth-poolmanager", strings.NewReader(strings.Join(c.log, "")))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(c.unused, unused); diff != "" {
			t.Errorf("%s, unused: %s", name, diff)
		}
		if diff := cmp.Diff(c.missing, missing); diff != "" {
			t.Errorf("%s, missing: %s", name, diff)
		}
	}
	for what, log := range map[string]string{"no JSON": "{}\nx\n", "too long": strings.Repeat("x", 5<<20) + "\n"} {
		if _, _, err := e2e.CompareRights(rights(all...), "hearth-system", "hearth-poolmanager", strings.NewReader(log)); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := e2e.Granted(rights()[2:], "hearth-system", "hearth-poolmanager"); err == nil || !strings.Contains(err.Error(), "Role r, which is not there") {
		t.Errorf("a binding to nothing: %v", err)
	}
}

// TestGranted are the daemons' rights as they are deployed.
func TestGranted(t *testing.T) {
	objects, err := deploy.Objects(nil)
	if err != nil {
		t.Fatal(err)
	}
	for account, least := range map[string]int{"hearth-poolmanager": 20, "hearth-nodeagent": 0, "hearth-gateway": 0} {
		rights, err := e2e.Granted(objects, "hearth-system", account)
		if err != nil || len(rights) < least || least == 0 && len(rights) > 0 {
			t.Errorf("%s: %v, %v", account, rights, err)
		}
	}
}

func FuzzAsked(f *testing.F) {
	f.Add([]byte(line(poolmanager, "get", "", "pods", "log", "hearth", "p")))
	f.Add([]byte("{}\n{\"objectRef\":null}\nnull\n[]\n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		asked, err := e2e.Asked(bytes.NewReader(log), poolmanager)
		if err == nil && len(asked) > bytes.Count(log, []byte("\n")) {
			t.Errorf("%d rights in %q", len(asked), log)
		}
	})
}
