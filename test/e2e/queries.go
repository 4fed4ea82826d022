package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/hearth-serverless/hearth/deploy"
)

// Query is one of a dashboard's panel, or a rule's.
type Query struct {
	Source string // where it stands, for people: "coldstarts.json, Phases, p99"
	Expr   string // with Grafana's variables in it
	Panel  bool   // a panel should show something; a rule should not
}

// variables are those that Grafana fills in itself, and the dashboards' own with All chosen.
func variables(window time.Duration) *strings.Replacer {
	return strings.NewReplacer("$__rate_interval", fmt.Sprintf("%ds", int(window.Seconds())),
		"$function", ".*", "$runtime", ".*", "$node", ".*")
}

// dashboard is as much of Grafana's as is needed to find queries.
type dashboard struct {
	UID, Title string
	Templating struct {
		List []struct {
			Name  string
			Type  string
			Query any
		}
	}
	Panels []struct {
		ID          int
		Type, Title string
		Targets     []struct{ Expr string }
	}
}

// Queries are all that deploy/ asks of a Prometheus.
func Queries() ([]Query, error) {
	dashboards, err := fs.Glob(deploy.Seen, "grafana/*.json")
	if err != nil {
		return nil, err
	}
	var all []Query
	for _, name := range dashboards {
		queries, err := panels(name)
		if err != nil {
			return nil, fmt.Errorf("dashboard %s: %w", name, err)
		}
		all = append(all, queries...)
	}
	queries, err := rules()
	if err != nil {
		return nil, fmt.Errorf("rules: %w", err)
	}
	return append(all, queries...), nil
}

func panels(name string) ([]Query, error) {
	text, err := deploy.Seen.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		return nil, err
	}
	var queries []Query
	for _, p := range d.Panels {
		for _, t := range p.Targets {
			queries = append(queries, Query{Source: path.Base(name) + ", " + p.Title, Expr: t.Expr, Panel: true})
		}
	}
	return queries, nil
}

func rules() ([]Query, error) {
	text, err := deploy.Seen.ReadFile("prometheus/alerts.yaml")
	if err != nil {
		return nil, err
	}
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Record, Expr string }
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		return nil, err
	}
	var queries []Query
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			queries = append(queries, Query{Source: "alerts.yaml, " + r.Alert + r.Record, Expr: r.Expr})
		}
	}
	return queries, nil
}

// maxAnswerBytes bounds what a Prometheus answers to a query.
const maxAnswerBytes = 16 << 20

// RunQueries asks a Prometheus all that deploy/ would ask it, rates over a window, which should reach back to the beginning of what
// was measured. The error names every query that fails, and every one of a panel to which the answer has no number: there is nothing, or nothing
// but NaN, as a quantile is of what has not happened in the window.
func RunQueries(ctx context.Context, prometheusURL string, window time.Duration) error {
	queries, err := Queries()
	if err != nil {
		return err
	}
	filled := variables(window)
	var faults []error
	for _, q := range queries {
		numbers, err := ask(ctx, prometheusURL, filled.Replace(q.Expr))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			faults = append(faults, fmt.Errorf("%s: %w: %s", q.Source, err, q.Expr))
		case q.Panel && numbers == 0:
			faults = append(faults, fmt.Errorf("%s is empty: %s", q.Source, q.Expr))
		}
	}
	return errors.Join(faults...)
}

// ask counts the numbers in the answer to a query.
func ask(ctx context.Context, base, expr string) (numbers int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/api/v1/query?"+url.Values{"query": {expr}}.Encode(), nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return 0, err
	}
	return count(text)
}

// count reads an answer of Prometheus's API.
func count(text []byte) (numbers int, err error) {
	var answer struct {
		Status, Error string
		Data          struct {
			ResultType string
			Result     json.RawMessage
		}
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return 0, fmt.Errorf("no answer of Prometheus: %w", err)
	}
	if answer.Status != "success" {
		return 0, fmt.Errorf("refused: %.300s", answer.Error)
	}
	var series []struct{ Value []any }
	switch answer.Data.ResultType {
	case "vector":
		if err := json.Unmarshal(answer.Data.Result, &series); err != nil {
			return 0, fmt.Errorf("no vector: %w", err)
		}
	case "scalar":
		series = make([]struct{ Value []any }, 1)
		if err := json.Unmarshal(answer.Data.Result, &series[0].Value); err != nil {
			return 0, fmt.Errorf("no scalar: %w", err)
		}
	default:
		return 0, fmt.Errorf("a %.40q is nothing that can be drawn", answer.Data.ResultType)
	}
	for _, s := range series {
		if len(s.Value) == 2 && !slices.Contains([]any{"NaN", nil}, s.Value[1]) {
			numbers++
		}
	}
	return numbers, nil
}
