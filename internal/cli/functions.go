package cli

import (
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func (a *app) list() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls", "functions"}, Short: "List functions", Args: takes(0, 0, ""),
		Example: "  hearth list\n  hearth list -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.functionList(c.Context())
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(messages(list))
			}
			rows := [][]string{{"NAME", "REVISION", "READY", "STARTING", "DESIRED", "AGE", "RUNS", "REASON"}}
			for _, f := range list {
				s := f.GetStatus()
				rows = append(rows, []string{
					f.GetName(), dash(s.GetRevision()), fmt.Sprint(s.GetReady()), fmt.Sprint(s.GetStarting()), fmt.Sprint(s.GetDesired()),
					age(s.GetCreatedAt().AsTime(), time.Now()), runs(f.GetSpec()), firstLine(s.GetReason()),
				})
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}

func (a *app) ps() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "ps [NAME]", Short: "List instances, all of them or a function's", Args: takes(0, 1, "at most the function's NAME"),
		Example: "  hearth ps\n  hearth ps hello -o json", ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error {
			list, err := a.instanceList(c.Context(), strings.Join(args, ""))
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(messages(list))
			}
			rows := [][]string{{"INSTANCE", "STATE", "DEGREE", "RUNTIME", "FUNCTION", "REVISION", "ADDRESS", "POD", "AGE", "NODE"}}
			for _, i := range list {
				rows = append(rows, []string{
					i.GetId(), stateName(i.GetState()), degreeName(i.GetDegree()), dash(i.GetRuntime()), dash(i.GetFunction()), dash(i.GetRevision()), dash(i.GetAddress()), dash(sharedPod(i)),
					age(i.GetCreatedAt().AsTime(), time.Now()), dash(i.GetNode()),
				})
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}

// sharedPod names the pod of an Instance that may have others beside it; those with the same are in one.
func sharedPod(i *hearthv1.Instance) string {
	if i.GetGroup() == "" {
		return ""
	}
	return i.GetPod()
}

// runs is what a Function is made of, in a word or three.
func runs(spec *hearthv1.FunctionSpec) string {
	if spec.GetRuntime() == "" {
		return spec.GetImage()
	}
	return strings.TrimSpace(spec.GetRuntime() + " " + spec.GetCode().GetHandler())
}

// firstLine keeps a trace out of a table.
func firstLine(text string) string {
	first, _, several := strings.Cut(printable(text), "\n")
	if several {
		return first + " …"
	}
	return first
}

// degreeName is a degree as people say it. Nodes from before there were several say none.
func degreeName(d hearthv1.Degree) string {
	if d == hearthv1.Degree_DEGREE_UNSPECIFIED {
		d = hearthv1.Degree_DEGREE_SANDBOX
	}
	return strings.ToLower(strings.TrimPrefix(d.String(), "DEGREE_"))
}

// stateName is a state as people say it: warm, serving, …
func stateName(s hearthv1.State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

func (a *app) delete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "Delete a function and end its instances",
		Args: takes(1, 1, "the function's NAME"), ValidArgsFunction: a.completeFunction, Example: "  hearth delete hello",
		RunE: func(c *cobra.Command, args []string) error {
			if _, err := a.functions().Delete(c.Context(), connect.NewRequest(&hearthv1.DeleteRequest{Name: args[0]})); err != nil {
				return explain(err, "delete "+args[0], a.run)
			}
			a.note("%s is deleted.", args[0])
			return nil
		},
	}
}

func (a *app) logs() *cobra.Command {
	req := &hearthv1.LogsRequest{}
	c := &cobra.Command{
		Use: "logs NAME", Short: "Print what a function's instances have written", Args: takes(1, 1, "the function's NAME"),
		Long:    "Prints the output of a function's instances, those that ended included as long as their logs are kept. Each line begins with\nits instance, unless --instance names one.",
		Example: "  hearth logs hello --tail 20\n  hearth logs hello -f", ValidArgsFunction: a.completeFunction,
		RunE: func(c *cobra.Command, args []string) error {
			req.Function = args[0]
			stream, err := a.node().Logs(c.Context(), connect.NewRequest(req))
			if err != nil {
				return explain(err, "logs of "+args[0], a.run)
			}
			defer stream.Close()
			for stream.Receive() {
				if err := a.printLine(stream.Msg(), req.GetInstanceId() == ""); err != nil {
					return err
				}
			}
			if err := stream.Err(); err != nil {
				return explain(err, "logs of "+args[0], a.run)
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&req.Follow, "follow", "f", false, "go on with what is written from now on")
	c.Flags().Int32Var(&req.Tail, "tail", 0, "begin with this many of the last lines (default all)")
	c.Flags().StringVar(&req.InstanceId, "instance", "", "only this instance; see `hearth ps`")
	return c
}

func (a *app) printLine(m *hearthv1.LogsResponse, prefix bool) error {
	if prefix {
		return a.printf("%s | %s\n", m.GetInstanceId(), m.GetLine())
	}
	return a.printf("%s\n", m.GetLine())
}
