package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/internal/kube/cluster"
)

// clusterDeployment is a cluster as a deployment.
type clusterDeployment struct{ *cluster.Client }

// Gateway is reached through a forwarded port.
func (d clusterDeployment) Gateway(ctx context.Context) (*gateway, error) {
	address, closed, err := d.ForwardGateway(ctx)
	if err != nil {
		return nil, err
	}
	// The environment's proxy has no part in it, and a connection that is kept would outlive the port.
	return &gateway{url: "http://" + address, transport: &http.Transport{DisableKeepAlives: true}, close: closed}, nil
}

// clusterStatusJSON is what status -o json prints of a cluster.
type clusterStatusJSON struct {
	*cluster.Status
	Degrees   map[string]int    `json:"warm_by_degree"`
	Functions []json.RawMessage `json:"functions"`
	Instances []json.RawMessage `json:"instances"`
}

func (a *app) clusterStatus(ctx context.Context, out format) error {
	c, err := a.cluster()
	if err != nil {
		return err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return a.explain(err, "status")
	}
	functions, err := a.functionList(ctx)
	if err != nil {
		return err
	}
	list, err := a.instanceList(ctx, "")
	if err != nil {
		return err
	}
	if out == formatJSON {
		return a.printJSON(clusterStatusJSON{Status: s, Degrees: count(list).degrees, Functions: messages(functions), Instances: messages(list)})
	}
	return a.printClusterStatus(s, functions, list)
}

func (a *app) printClusterStatus(s *cluster.Status, functions []*hearthv1.Function, list []*hearthv1.Instance) error {
	leads := "nobody leads"
	if s.Leader != "" {
		leads = fmt.Sprintf("%s leads, epoch %d", s.Leader, s.Epoch)
	}
	if err := a.printf("Cluster of context %s at %s; functions in namespace %s; %s\n\n", s.Context, s.Server, s.Namespace, leads); err != nil {
		return err
	}
	rows := [][]string{{"DAEMON", "POD", "NODE", "READY", "VERSION", "RESTARTS", "AGE", "REASON"}}
	for _, d := range s.Daemons {
		name := d.Name
		if d.Leader {
			name += " (leads)"
		}
		rows = append(rows, []string{name, d.Pod, dash(d.Node), yesNo(d.Ready), dash(d.Version), strconv.Itoa(d.Restarts), age(d.Created, time.Now()), firstLine(d.Reason)})
	}
	if err := a.table(rows); err != nil {
		return err
	}
	rows = [][]string{{"\nNODE", "READY", "SCHEDULABLE", "NODEAGENT"}}
	for _, n := range s.Nodes {
		rows = append(rows, []string{n.Name, yesNo(n.Ready), yesNo(n.Schedulable), yesNo(n.Nodeagent)})
	}
	if len(s.Nodes) > 0 {
		if err := a.table(rows); err != nil {
			return err
		}
	}
	return a.printf("\n%s, %s\n", plural(len(functions), "function"), count(list).onNodes())
}
