package e2e_test

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	promql "github.com/prometheus/prometheus/promql/parser"

	"github.com/hearth-serverless/hearth/deploy"
	"github.com/hearth-serverless/hearth/test/e2e"
)

// metrics of the code, by name: whether each is a histogram.
func metrics(t *testing.T) map[string]bool {
	t.Helper()
	found, root := map[string]bool{}, filepath.Join("..", "..")
	metric := regexp.MustCompile(`^hearth_[a-z]+_[a-z_]+$`)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"test", "bench", "bin", "tools"}, d.Name())):
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CompositeLit:
				if s, ok := n.Type.(*ast.SelectorExpr); ok && s.Sel.Name == "HistogramOpts" {
					for _, e := range n.Elts {
						if field, ok := e.(*ast.KeyValueExpr); ok {
							found[literal(field.Value)] = true
						}
					}
				}
			case *ast.BasicLit:
				if name := literal(n); metric.MatchString(name) {
					found[name] = found[name] // a histogram stays one
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 60 || !found["hearth_instance_phase_seconds"] || found["hearth_instance_instances"] {
		t.Fatalf("metrics of the code were not found: %v", found)
	}
	return found
}

// literal is the value of a constant string, if it is one.
func literal(e ast.Expr) string {
	if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
		value, _ := strconv.Unquote(l.Value)
		return value
	}
	return ""
}

// others are metrics that every program has that is scraped.
var others = []string{"up", "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"}

// TestQueriesAreOfMetricsThatExist parses every query as Prometheus does, and looks for its metrics in the code.
func TestQueriesAreOfMetricsThatExist(t *testing.T) {
	queries, err := e2e.Queries()
	if err != nil {
		t.Fatal(err)
	}
	known, used, rules := metrics(t), map[string]bool{}, 0
	for _, q := range queries {
		if !q.Panel {
			rules++
		}
		expr, err := promql.ParseExpr(e2e.Filled(q.Expr, time.Minute))
		if err != nil {
			t.Errorf("%s: %v: %s", q.Source, err, q.Expr)
			continue
		}
		promql.Inspect(expr, func(n promql.Node, _ []promql.Node) error {
			if s, ok := n.(*promql.VectorSelector); ok {
				name := s.Name
				for _, suffix := range []string{"_bucket", "_sum", "_count"} {
					if base, ok := strings.CutSuffix(name, suffix); ok && known[base] {
						name = base
					}
				}
				used[name] = true
				if histogram, ok := known[name]; !ok && !slices.Contains(others, name) {
					t.Errorf("%s: nothing tells %s: %s", q.Source, name, q.Expr)
				} else if histogram && name == s.Name {
					t.Errorf("%s: %s is a histogram: %s", q.Source, name, q.Expr)
				}
			}
			return nil
		})
	}
	if len(queries)-rules < 50 || rules < 10 {
		t.Errorf("%d queries, %d of them rules", len(queries), rules)
	}
	t.Logf("%d queries use %d of %d metrics", len(queries), len(used), len(known))
}

// TestDashboards are Grafana's own demands: one id a panel, one uid a dashboard, variables that are defined.
func TestDashboards(t *testing.T) {
	names, err := fs.Glob(deploy.Seen, "grafana/*.json")
	if err != nil || len(names) < 4 {
		t.Fatalf("%v, %v", names, err)
	}
	uids, variable := map[string]bool{}, regexp.MustCompile(`\$\{?([a-z]+)`)
	for _, name := range names {
		text, err := deploy.Seen.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var d struct {
			UID, Title string
			Templating struct{ List []struct{ Name string } }
			Panels     []struct {
				ID          int
				Type, Title string
				GridPos     struct{ H, W, X, Y int }
				Targets     []struct{ Expr, LegendFormat string }
			}
		}
		if err := json.Unmarshal(text, &d); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if uids[d.UID] || d.UID == "" || d.Title == "" {
			t.Errorf("%s: uid %q, title %q", name, d.UID, d.Title)
		}
		uids[d.UID] = true
		defined, ids := map[string]bool{}, map[int]bool{}
		for _, v := range d.Templating.List {
			defined[v.Name] = true
		}
		for _, v := range variable.FindAllStringSubmatch(string(text), -1) {
			if !defined[v[1]] {
				t.Errorf("%s: $%s is not defined", name, v[1])
			}
		}
		for i, p := range d.Panels {
			if ids[p.ID] || p.Title == "" || p.Type != "row" && len(p.Targets) == 0 {
				t.Errorf("%s: panel %d %q", name, p.ID, p.Title)
			}
			ids[p.ID] = true
			for _, other := range d.Panels[:i] {
				if a, b := p.GridPos, other.GridPos; a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
					t.Errorf("%s: %q lies over %q", name, p.Title, other.Title)
				}
			}
		}
	}
}

// TestRunQueries runs them against one that answers as Prometheus does.
func TestRunQueries(t *testing.T) {
	answer := func(result string) string {
		return `{"status":"success","data":{"resultType":"vector","result":[` + result + `]}}`
	}
	one, nan := answer(`{"metric":{},"value":[1,"0"]}`), answer(`{"metric":{},"value":[1,"NaN"]}`)
	for name, c := range map[string]struct {
		answer func(query string) (int, string)
		faults []string
	}{
		"well": {func(string) (int, string) { return 200, one }, nil},
		"scalars": {func(string) (int, string) {
			return 200, `{"status":"success","data":{"resultType":"scalar","result":[1,"2"]}}`
		}, nil},
		"an empty panel": {func(q string) (int, string) {
			if strings.Contains(q, "hearth_instance_thaw_seconds") {
				return 200, nan
			}
			return 200, one
		}, []string{"coldstarts.json, Thawing is empty"}},
		"quiet rules": {func(q string) (int, string) {
			if strings.Contains(q, ">") || strings.Contains(q, "==") {
				return 200, answer("")
			}
			return 200, one
		}, nil},
		"an error": {func(q string) (int, string) {
			if strings.HasPrefix(q, "absent(") {
				return 422, `{"status":"error","errorType":"execution","error":"too much"}`
			}
			return 200, one
		}, []string{"alerts.yaml, HearthNoGateway: refused: too much"}},
		"a range": {func(string) (int, string) {
			return 200, `{"status":"success","data":{"resultType":"matrix","result":[]}}`
		}, []string{`"matrix"`}},
		"another one": {func(string) (int, string) { return 502, `<html>` }, []string{"no answer of Prometheus", "HearthVersionsDiffer"}},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			query := r.URL.Query().Get("query")
			if r.URL.Path != "/api/v1/query" || strings.Contains(query, "$") {
				t.Errorf("asked %s", r.URL)
			}
			code, text := c.answer(query)
			w.WriteHeader(code)
			_, _ = w.Write([]byte(text))
		}))
		err := e2e.RunQueries(t.Context(), server.URL, time.Minute)
		server.Close()
		if (err == nil) != (c.faults == nil) {
			t.Errorf("%s: %v", name, err)
		}
		for _, f := range c.faults {
			if err == nil || !strings.Contains(err.Error(), f) {
				t.Errorf("%s: %v, want %q", name, err, f)
			}
		}
	}
}

func FuzzCount(f *testing.F) {
	f.Add([]byte(`{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"0"]}]}}`))
	f.Add([]byte(`{"status":"success","data":{"resultType":"scalar","result":[1]}}`))
	f.Add([]byte(`{"status":"success","data":{"resultType":"vector","result":[{"value":[[1],{"a":1}]}]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if n, err := e2e.Count(text); err != nil && n != 0 {
			t.Errorf("%d numbers and %v", n, err)
		}
	})
}
